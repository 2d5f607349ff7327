"""The contenders' processes, seen from the one that drives them, and commands run to their end."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.inputs import ROOT
from deploy.common.cli import UserError

# What decides threads and code paths; contenders get these from the benchmark only.
CLEARED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")
QUIET = 0.3  # seconds before each command: OpenMP's threads of the process before it spin for 0.2 seconds
DISTURBED = 0.05  # share of the machine's time; a measurement beside which other processes took more is repeated,
ATTEMPTS = 4  # so often in all,
LONG = 30.0  # unless it takes longer than this, in seconds: what disturbs it is brief by comparison


@dataclass(frozen=True)
class Contender:
    """How to start a contender's process, and what it is, in a sentence."""

    name: str
    description: str
    arguments: tuple[str, ...]  # of benchmarks.worker
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable


class Worker:
    """A contender's process, which waits for commands."""

    def __init__(self, contender: Contender) -> None:
        """Start it and wait until it is ready.

        Raises:
            UserError: it cannot start.
        """
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by stop()
        self._process = subprocess.Popen(
            [contender.python, "-m", "benchmarks.worker", *contender.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=clean_environment(contender.environment),
        )
        self.description: dict[str, Any] = self._answer()

    def ask(self, call: str, **arguments: Any) -> Any:
        """Let the contender measure something, again if other processes disturbed it; see benchmarks.contenders.

        Raises:
            UserError: it failed or ended.
        """
        for _ in range(ATTEMPTS):
            time.sleep(QUIET)
            begun, others = time.perf_counter(), OtherProcesses(self._process.pid)
            answer = self.ask_once(call, **arguments)
            if others.share() <= DISTURBED or time.perf_counter() - begun > LONG:
                break
        return answer

    def ask_once(self, call: str, **arguments: Any) -> Any:
        """The same without a repetition: for what depends on the calls before it, and for what is not timed.

        Raises:
            UserError: it failed or ended.
        """
        self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with code {self._process.wait()}"}
        if "result" not in answer:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            self.stop()
            raise UserError(f"benchmark of {self.contender.name}: {answer['error']} ({' '.join(said[-1:])})")
        return answer["result"]


class OtherProcesses:
    """How much of the machine's CPU time other processes took since this object was made; Linux only."""

    def __init__(self, pid: int | None = None) -> None:
        """Other than `pid`, or than this process and its children, which must have ended at the end."""
        self._pid = pid
        self._start = self._seconds()

    def share(self) -> float:
        """0 to 1."""
        total, busy, own = (now - start for now, start in zip(self._seconds(), self._start, strict=True))
        return min(max((busy - own) / max(total, 0.01), 0.0), 1.0)

    def _seconds(self) -> tuple[float, float, float]:
        """Of all cores: in total, busy, and busy for what is not other."""
        per_second = os.sysconf("SC_CLK_TCK")
        ticks = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
        if self._pid is None:
            own = sum(os.times()[:4])
        else:
            user, system = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            own = (int(user) + int(system)) / per_second
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, own


@dataclass(frozen=True)
class Finished:
    """A command that ran to its end: wall-clock seconds, and its largest resident size in bytes."""

    seconds: float
    peak: int


def run_command(command: Sequence[str], folder: Path, changes: dict[str, str] | None = None) -> Finished:
    """Run a command in a folder, with these changes to the environment.

    Raises:
        UserError: its exit code is not 0.
    """
    time.sleep(QUIET)
    with tempfile.TemporaryFile("w+") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=clean_environment(changes or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise UserError(f"{' '.join(command)}: exit code {process.returncode} ({output.read()[-300:]})")
    return Finished(seconds, usage.ru_maxrss * 1024)


def clean_environment(changes: dict[str, str]) -> dict[str, str]:
    """The user's environment without what sets threads and code paths, then the changes."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return {**kept, **changes}
