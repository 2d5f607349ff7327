"""Commands as forked processes, which start at once: they may be many, or killed at any moment. No test is in here."""

import atexit
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = ("train", "eval", "predict", "deploy.export_model", "deploy.infer")
# What the commands import when they get to it; the server that forks has it all.
LATER = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "models.export_form",
    "utils.averaging",
    "utils.evaluation",
)


def start(
    module: str,
    options: Sequence[str],
    folder: Path,
    environ: Mapping[str, str] | None = None,
    kill_at_rename: int = 0,
    signal_at_rename: int = signal.SIGKILL,
    largest_file: int = 0,
    draws: bool = False,
) -> multiprocessing.Process:
    """The process of `module.main` in this folder; what it says goes to `outputs` there.

    Args:
        environ: its environment; None for that of the caller.
        kill_at_rename: it gets the signal just before it gives the n-th file its name; 0 for never.
        signal_at_rename: kill -9 if no other is named.
        largest_file: bytes beyond which it cannot write a file; 0 for any.
        draws: its figures are drawn. They take as long as a small model's training, so each is one dot otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.forked_server"])
    variables = dict(os.environ if environ is None else environ)
    hazards = kill_at_rename, signal_at_rename, largest_file
    process = context.Process(target=_run, args=(module, options, folder, variables, *hazards, draws))
    process.start()
    return process


def outputs(folder: Path, pid: int) -> tuple[Path, Path]:
    """The files of what the process says on stdout and on stderr."""
    return folder / f"output-{pid}.txt", folder / f"errors-{pid}.txt"


def run(
    script: str,
    options: Sequence[str],
    folder: Path,
    environ: Mapping[str, str] | None = None,
    draws: bool = False,
    seconds: float = 300,
) -> subprocess.CompletedProcess:
    """Run a script of the repository to its end, like `subprocess.run` with texts captured; `draws` as in `start`.

    Raises:
        subprocess.TimeoutExpired: it takes longer than that.
    """
    process = start(script.removesuffix(".py").replace("/", "."), options, folder, environ, draws=draws)
    process.join(seconds)
    said = outputs(folder, process.pid)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired([script, *options], seconds, *(path.read_bytes() for path in said))
    done = subprocess.CompletedProcess([script, *options], process.exitcode, *(path.read_text() for path in said))
    for path in said:
        path.unlink()
    return done


def _run(
    module: str,
    options: Sequence[str],
    folder: Path,
    environ: Mapping[str, str],
    kill_at_rename: int,
    signal_at_rename: int,
    largest_file: int,
    draws: bool,
) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    from deploy.common.cli import run_main

    os.chdir(folder)
    for stream, path in enumerate(outputs(Path(), os.getpid()), start=1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environ)
    renames = 0

    def count(event: str, details: tuple) -> None:
        nonlocal renames
        if event == "os.rename" and not str(details[1]).endswith(".pyc"):  # as Python names what it has compiled
            renames += 1
            if renames == kill_at_rename:
                os.kill(os.getpid(), signal_at_rename)

    sys.addaudithook(count)
    if not draws:
        Figure.savefig = lambda figure, path, **_: Image.new("L", (1, 1)).save(path)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [module, *options]
    try:
        run_main(importlib.import_module(module).main)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
