"""Clocks for measurements inside a worker. No framework here."""

import gc
import time
from collections.abc import Callable
from pathlib import Path


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for about `seconds`, at least one call."""
    gc.collect()
    samples: list[float] = []
    while not samples or sum(samples) < seconds:
        begun = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begun)
    return samples


def repeat_steps(passes: Callable[[], object], update: Callable[[], object], seconds: float) -> dict[str, list[float]]:
    """The same for training steps: seconds of `passes` alone and of both."""
    gc.collect()
    samples: dict[str, list[float]] = {"passes": [], "whole": []}
    while not samples["whole"] or sum(samples["whole"]) < seconds:
        begun = time.perf_counter()
        passes()
        halfway = time.perf_counter()
        update()
        samples["passes"].append(halfway - begun)
        samples["whole"].append(time.perf_counter() - begun)
    return samples


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes.

    Linux counts it from the start of the program; `getrusage` would count the parent's size at the fork too.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
