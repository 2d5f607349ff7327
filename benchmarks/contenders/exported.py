"""This repository's exported model in one of its runtimes, by the functions that deploy/infer.py calls."""

from pathlib import Path
from typing import Any

from benchmarks.inputs import random_images
from benchmarks.timing import repeat
from deploy.backends import Options, load_exported


class Exported:
    """See benchmarks.contenders for the measurements."""

    def __init__(self, folder: str, backend: str, precision: str, winograd: bool, threads: int) -> None:
        # the batches that are measured
        options = Options(threads=threads, precision=precision, usual_batches=(1, 8), winograd=winograd)
        self._model = load_exported(Path(folder), backend, options)
        self._description = {
            "runtime": self._model.version,
            "precision": precision,
            "winograd": winograd,
            "threads": threads,
        }

    def describe(self) -> dict[str, Any]:
        """Version of the runtime, precision, threads."""
        return self._description

    def forward(self, size: int, batch: int, seconds: float) -> list[float]:
        images = random_images(batch, size)
        return repeat(lambda: self._model.run(images), seconds)
