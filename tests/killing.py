"""Commands as forked processes, which start at once, to be killed at any moment. No test is in here."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

MODULES = ("train", "eval", "deploy.export_model")
# What the commands import when they get to it; the server that forks has it all.
LATER = ("matplotlib.backends.backend_agg", "models.inference_form", "utils.averaging", "utils.evaluation")


def start(
    module: str, options: list[str], folder: Path, kill_at_rename: int = 0, largest_file: int = 0
) -> multiprocessing.Process:
    """The process of `module.main` in this folder; its output goes to output-{pid}.txt there.

    Args:
        kill_at_rename: it ends by kill -9 just before it gives the n-th file its name; 0 for never.
        largest_file: bytes beyond which it cannot write a file; 0 for any.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.killing_server"])
    process = context.Process(target=_run, args=(module, options, folder, kill_at_rename, largest_file))
    process.start()
    return process


def _run(module: str, options: list[str], folder: Path, kill_at_rename: int, largest_file: int) -> None:
    from deploy.cli import run_main

    os.chdir(folder)
    with open(f"output-{os.getpid()}.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    renames = 0

    def count(event: str, _: tuple) -> None:
        nonlocal renames
        renames += event == "os.rename"
        if event == "os.rename" and renames == kill_at_rename:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [module, *options]
    run_main(importlib.import_module(module).main)
