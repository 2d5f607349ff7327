"""Backbone features of a list of pictures. The backbone is frozen and nothing is augmented: they are computed once."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from datasets.mvtec import read_batches
from deploy.common.imaging import normalise, read_rgb
from deploy.common.runtime import available_memory, local_processes
from models.backbone import feature_shapes

CACHING_BATCH = 8  # pictures a pass
BLOCK = 2**20  # bytes


@dataclass
class CacheBudget:
    """What caches may still take, in bytes; each cache subtracts what it takes."""

    memory: float
    disk: float
    device: float = 0.0

    @classmethod
    def from_options(cls, memory_gib: float | None, disk_gib: float | None, device_gib: float | None) -> "CacheBudget":
        """Limits in GiB; None is half of what is free now, in main memory or in the folder of temporary files.

        Processes that train together on one machine share that half. On a GPU None is a quarter of its memory, of
        which training leaves more than that; a CPU has no memory of its own.
        """
        device = 0.0
        if paddle.get_device().startswith("gpu"):
            total = paddle.device.cuda.get_device_properties().total_memory
            device = total / 4 if device_gib is None else device_gib * 2**30
        memory = available_memory() / 2 / local_processes() if memory_gib is None else memory_gib * 2**30
        disk = _free_disk() / 2 / local_processes() if disk_gib is None else disk_gib * 2**30
        return cls(memory, disk, device)


class FeatureCache:
    """The backbone's feature maps of pictures, kept in the first of these places that has room:

    * `device`: the features, in the GPU's memory, so that no step waits for a copy;
    * `memory`: the features, in main memory;
    * `file`: the features, in a memory-mapped temporary file that vanishes with the process;
    * `pictures`: the decoded and resized pictures in main memory, features are computed for each batch;
    * `nothing`: pictures are read, and features computed, for each batch.

    `place` says which one it is.
    """

    def __init__(
        self,
        backbone: nn.Layer,
        paths: Sequence[Path],
        size: tuple[int, int],
        budget: CacheBudget,
        description: str,
        read: Callable[[Path], np.ndarray] = read_rgb,
    ) -> None:
        """Read all pictures once with `read`, resized to `size` = (H, W), so that a damaged one shows here.

        Raises:
            UserError: a picture cannot be read.
        """
        self._backbone, self._paths, self._size, self._read = backbone, list(paths), size, read
        shapes = feature_shapes(backbone, size)
        feature_bytes = 4 * len(paths) * sum(math.prod(shape) for shape in shapes)  # of float32
        picture_bytes = len(paths) * math.prod(size) * 3
        self._features: list[np.ndarray] | list[Tensor] = []
        self._pictures: np.ndarray | None = None
        if 0 < feature_bytes <= budget.device:
            self.place = "device"
            self._features = [paddle.empty([len(paths), *shape]) for shape in shapes]
            budget.device -= feature_bytes
        elif feature_bytes <= budget.memory:
            self.place = "memory"
            self._features = [np.empty((len(paths), *shape), np.float32) for shape in shapes]
            budget.memory -= feature_bytes
        elif feature_bytes <= budget.disk and (file := _temporary_file(feature_bytes)) is not None:
            self.place = "file"
            self._features = _map_arrays(file, len(paths), shapes)
            budget.disk -= feature_bytes
        elif picture_bytes <= budget.memory:
            self.place = "pictures"
            self._pictures = np.empty((len(paths), *size, 3), np.uint8)
            budget.memory -= picture_bytes
        else:
            self.place = "nothing"
        self._fill(description)

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: np.ndarray) -> list[Tensor]:
        """Features of these pictures, (B, C, h, w) per scale, on the device."""
        if self.place == "device":
            return [paddle.index_select(maps, paddle.to_tensor(indices)) for maps in self._features]
        if self._features:
            return [paddle.to_tensor(maps[indices]) for maps in self._features]
        if self._pictures is not None:
            return self._compute(self._pictures[indices])
        return self._compute(
            next(read_batches([self._paths[i] for i in indices], len(indices), self._size, self._read))
        )

    def _compute(self, pictures: np.ndarray) -> list[Tensor]:
        """(B, H, W, 3) uint8 -> features, (B, C, h, w) per scale."""
        return self._backbone(paddle.to_tensor(normalise(pictures)))

    def _fill(self, description: str) -> None:
        start = 0
        with tqdm(total=len(self), desc=description, unit="image", disable=None, leave=False) as bar:
            for pictures in read_batches(self._paths, CACHING_BATCH, self._size, self._read):
                end = start + len(pictures)
                if self._features:
                    for whole, part in zip(self._features, self._compute(pictures), strict=True):
                        whole[start:end] = part if self.place == "device" else part.numpy()
                elif self._pictures is not None:
                    self._pictures[start:end] = pictures
                bar.update(end - start)
                start = end


def _free_disk() -> int:
    """Bytes that are free in the folder of temporary files; 0 if none can be written to, as on a full disk."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0


def _temporary_file(size: int) -> IO[bytes] | None:
    """A file without a name of `size` bytes, or None if the disk has no room after all."""
    try:
        file = tempfile.TemporaryFile(prefix="fastflow-features-")  # noqa: SIM115  (it outlives this function)
    except OSError:
        return None
    try:
        _take_room(file, size)  # writing to a mapped file on a full disk would kill the process
    except OSError:
        file.close()
        return None
    return file


def _take_room(file: IO[bytes], size: int) -> None:
    """Make the file as long as that, with room on its disk for all of it.

    Raises:
        OSError: the disk has no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, BLOCK):  # macOS and Windows
        file.write(bytes(min(BLOCK, size - start)))
    file.flush()


def _map_arrays(file: IO[bytes], count: int, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """float32 arrays (count, *shape), one behind the other in the file."""
    arrays, offset = [], 0
    for shape in shapes:
        arrays.append(np.memmap(file, np.float32, "r+", offset, (count, *shape)))
        offset += arrays[-1].nbytes
    return arrays
