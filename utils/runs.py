"""Scripts of this repository in processes of their own: how they start, are told from each other, and end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from deploy.common.cli import UserError

GRACE = 10  # seconds that a training has to end by itself when it is interrupted
# Becomes the script argv[2:], which Linux kills when its starter, process argv[1], ends, be it by kill -9: a training
# that was left alone would keep its folder from the next train.sh. Code between fork and exec is no way to ask for it
# where there are threads. 1 is PR_SET_PDEATHSIG; the starter may have ended before. Ray's processes block SIGINT, and
# so would those that they start.
TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Run(Protocol):
    """A script at work: gone through, it gives the lines that it prints, until its end."""

    where: str  # it runs: " on GPU 0"; empty where that says itself
    code: int  # its exit code, after the last line; the number of a signal is negative

    def __iter__(self) -> Iterator[str]: ...


class Runs(Protocol):
    """Where scripts can run."""

    places: int  # scripts at a time

    def start(self, words: Sequence[str], folder: Path) -> contextlib.AbstractContextManager[Run]:
        """Run a script, once there is a place for it. `words`: its file and options; `folder`: which it holds.

        Raises:
            UserError: it cannot be started, or all was stopped.
        """
        ...

    def stop(self) -> None:
        """End all scripts, and start none any more."""
        ...


def tied(words: Sequence[str]) -> list[str]:
    """The command that runs a script, given by its file and options, until this process ends."""
    return [sys.executable, "-c", TIED, str(os.getpid()), *words]


def begin(words: Sequence[str], environ: dict[str, str]) -> subprocess.Popen:
    """The process of a script, tied to this one; it prints UTF-8, and has no terminal whose Ctrl-C it would get too."""
    return subprocess.Popen(
        tied(words),
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes: they are asked, and killed if they take too long or the user asks again."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    try:
        for process in processes:
            process.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()


def on_device(gpu: str | None, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a script that is to use the device, a card as in CUDA_VISIBLE_DEVICES or any."""
    if gpu is None:
        return [], environ
    # Without the option a wrong number would train on the CPU.
    return ["--device", "gpu"], {**environ, "CUDA_VISIBLE_DEVICES": gpu}


class LocalRun:
    """A `Run` on this machine."""

    def __init__(self, process: subprocess.Popen, gpu: str | None) -> None:
        self.where = f" on GPU {gpu}" if gpu else ""
        self._process = process

    def __iter__(self) -> Iterator[str]:
        with self._process:
            yield from self._process.stdout
        self.code = self._process.returncode


class LocalRuns:
    """`Runs` on this machine, each on a device of its own."""

    def __init__(self, devices: Sequence[str | None], environ: dict[str, str]) -> None:
        """
        Args:
            devices: of each place, see `on_device`.
            environ: of the processes.
        """
        self.places = len(devices)
        # The processes share the cores and the memory for features as those of paddle.distributed.launch do.
        self._environ = {**environ, "PADDLE_LOCAL_SIZE": str(self.places)}
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._lock = threading.Lock()  # of the two below
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    @contextlib.contextmanager
    def start(self, words: Sequence[str], folder: Path) -> Iterator[LocalRun]:
        """See `Runs`."""
        gpu = self._free.get()
        try:
            arguments, environ = on_device(gpu, self._environ)
            with self._lock:
                if self._stopped:
                    raise UserError("not started")
                process = begin([*words, *arguments], environ)
                self._processes.append(process)
            yield LocalRun(process, gpu)
        finally:
            self._free.put(gpu)

    def stop(self) -> None:
        """See `Runs`."""
        with self._lock:
            self._stopped = True
        end(self._processes)
