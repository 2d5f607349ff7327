"""Scripts of this repository on the machines of a Ray cluster, which share the folder that they run in."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.cluster.connection import answer, places
from deploy.common.cli import UserError
from deploy.common.files import hold_folder
from deploy.common.runtime import available_cores
from utils.runs import GRACE, begin, end

DEATHS = 5  # of processes that ran one script; then it has failed
HELD = 120.0  # seconds in which a process ends whose machine was lost, and file systems notice that
ASKED = 1.0  # seconds that an actor waits for a line before it says that there is none


class Script:
    """An actor: a script on the machine that has room for it."""

    def begin(self, words: Sequence[str], cwd: Path, folder: Path, environ: dict[str, str], cpus: int) -> str:
        """Start it; the name of the machine.

        Args:
            words: its file and options.
            cwd: where it runs.
            folder: which it holds, below that.
            environ: what is added to the machine's environment.
            cpus: of which it has so many.

        Raises:
            UserError: the machine does not share the folder, or another process holds it for too long.
        """
        name = socket.gethostname()
        if not folder.is_dir():  # the driver has made it
            raise UserError(f"{folder}: is not there on machine {name}; all machines must share {cwd}")
        os.chdir(cwd)
        _wait_for(folder)
        # A machine's trainings share its memory for features, as those of train.sh do. Ray knows how many they can be,
        # but processes of Ray 2.60 that have asked it (ray.nodes) were seen to hang at their end.
        share = {"OMP_NUM_THREADS": str(cpus), "PADDLE_LOCAL_SIZE": str(max(1, available_cores() // cpus))}
        self._process = begin(words, {**os.environ, **environ, **share})
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return name

    def lines(self) -> tuple[list[str], int | None]:
        """What it has printed since the last call, and its exit code once there is no more to come."""
        ended = not self._reader.is_alive()
        found = []
        with contextlib.suppress(Empty):
            found.append(self._lines.get(timeout=0 if ended else ASKED))
            while True:
                found.append(self._lines.get_nowait())
        return found, self._process.wait() if ended else None

    def end(self) -> None:
        """Interrupt it."""
        end([self._process])

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)


def _wait_for(folder: Path) -> None:
    """Wait until no process holds the folder: the one of a lost machine may not know yet that it is."""
    deadline = time.monotonic() + HELD
    while True:
        try:
            return hold_folder(folder)()
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(ASKED)


class ClusterRun:
    """A `Run` on a machine of the cluster, which goes on on another one if that is lost."""

    def __init__(self, runs: "ClusterRuns", words: Sequence[str], folder: Path) -> None:
        self._runs, self._words, self._folder = runs, words, folder
        self.actor: Any = None
        self.begun = False
        self._deaths = 0

    def begin(self) -> None:
        """Wait until a machine has room, and start there.

        Raises:
            UserError: as `Script.begin`; all was stopped; machines are lost again and again.
        """
        again = ["--resume"] * bool(self._deaths and "--resume" not in self._words)
        while not self.begun:
            self.actor = self._runs.hire()
            try:
                started = self.actor.begin.remote(
                    [*self._words, *again], Path.cwd(), self._folder, self._runs.environ, self._runs.cpus
                )
                while not ray.wait([started], timeout=ASKED)[0]:  # for room; all may be stopped meanwhile
                    if self._runs.stopped:
                        raise UserError("stopped")
                machine = answer(started)
            except RayError as error:
                self._lost(error)
            else:
                self.begun, self.where = True, f" on machine {machine}"

    def __iter__(self) -> Iterator[str]:
        code = None
        while code is None:
            try:
                lines, code = answer(self.actor.lines.remote())
            except RayError as error:
                self._lost(error)
                self.begin()
                lines = [f"its machine was lost, it goes on{self.where}\n"]
            yield from lines
        self.code = code

    def _lost(self, error: RayError) -> None:
        self.begun = False
        self._deaths += 1
        ray.kill(self.actor)
        if self._runs.stopped or self._deaths == DEATHS:
            reason = " ".join(str(error).split())
            raise UserError("stopped" if self._runs.stopped else f"lost {DEATHS} machines ({reason})") from error


class ClusterRuns:
    """`Runs` on the machines of the cluster that this process has joined."""

    def __init__(self, cpus: int, gpus: float, jobs: int | None) -> None:
        """
        Args:
            cpus, gpus: of each script.
            jobs: how many at a time; None: as many as there is room for.

        Raises:
            UserError: there is room for none.
        """
        room = places(cpus, gpus)
        self.places = jobs or room
        self.cpus = cpus
        self.stopped = False
        self.environ = {name: value for name, value in os.environ.items() if name.startswith("FASTFLOW_")}
        self._device = ["--device", "gpu"] * bool(gpus)
        self._kind = ray.remote(num_cpus=cpus, num_gpus=gpus)(Script)
        self._lock = threading.Lock()  # of `stopped` and the runs
        self._runs: list[ClusterRun] = []

    @contextlib.contextmanager
    def start(self, words: Sequence[str], folder: Path) -> Iterator[ClusterRun]:
        """See `Runs`."""
        run = ClusterRun(self, [str(Path(words[0]).absolute()), *words[1:], *self._device], folder.absolute())
        self._runs.append(run)
        try:
            run.begin()
            yield run
        finally:
            self._runs.remove(run)
            self._dismiss(run)

    def hire(self) -> Any:
        """An actor, where there is room for it or will be.

        Raises:
            UserError: all was stopped.
        """
        with self._lock:
            if self.stopped:
                raise UserError("not started")
            return self._kind.remote()

    def stop(self) -> None:
        """See `Runs`."""
        with self._lock:
            self.stopped = True
        runs = list(self._runs)
        ends = [run.actor.end.remote() for run in runs if run.begun]
        try:
            for run in runs:
                if not run.begun:
                    self._dismiss(run)
            ray.wait(ends, num_returns=len(ends), timeout=GRACE + ASKED)
        except KeyboardInterrupt:
            for run in runs:
                self._dismiss(run)

    def _dismiss(self, run: ClusterRun) -> None:
        if run.actor is not None:
            ray.kill(run.actor)
