"""Backbone features of pictures or tiles. The backbone is frozen, nothing is augmented: they are computed once."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from datasets.mvtec import read_ahead
from deploy.common.imaging import normalise, read_rgb, upright_size
from deploy.common.runtime import available_memory, local_processes
from deploy.common.tiles import Layout, Place, Tiling
from models.backbone import feature_shapes

CACHING_BATCH = 8  # pictures a pass
BLOCK = 2**20  # bytes
MAP_PIXELS = 2**28  # of all pictures' maps that are kept to be measured


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
    """The backbone's feature maps of pictures, or of their tiles, kept in the first of these places that has room:

    * `device`: the features, in the GPU's memory, so that no step waits for a copy;
    * `memory`: the features, in main memory;
    * `file`: the features, in a memory-mapped temporary file that vanishes with the process;
    * `pictures`: the decoded and resized pictures, or the tiles, in main memory, features are computed for each batch;
    * `nothing`: pictures are read, and features computed, for each batch.

    `place` says which one it is. An item is a picture or, where the layout has tiles, a tile.
    """

    def __init__(
        self,
        backbone: nn.Layer,
        paths: Sequence[Path],
        layout: Layout,
        budget: CacheBudget,
        description: str,
        read: Callable[[Path], np.ndarray] = read_rgb,
        drawn_tiles: int | None = None,
    ) -> None:
        """Read all pictures once with `read`, so that a damaged one shows here.

        Args:
            backbone: makes the features.
            paths: of the pictures.
            layout: what is done with a picture before it is cut, and how it is.
            budget: for what is kept.
            description: of the pictures, for the progress bar.
            read: gives a picture, (h, w, 3) uint8 RGB.
            drawn_tiles: so many of each picture, at places that `draw` chooses anew each time; of these no features
                are kept, which would serve once. None: all tiles of the layout.

        Raises:
            UserError: a picture cannot be read, or is not in the shape of the region of interest.
        """
        self.layout = layout
        self._backbone, self._paths, self._read = backbone, list(paths), read
        self._description, self._drawn = description, drawn_tiles
        self.tilings = tilings_of(layout, self._paths)
        self._items = self._chosen([0])
        size = layout.model_size
        self._shapes = shapes = feature_shapes(backbone, size)
        count = len(self)
        feature_bytes = _feature_bytes(shapes, count)
        picture_bytes = count * math.prod(size) * 3
        self._features: list[np.ndarray] | list[Tensor] = []
        self._pictures: np.ndarray | None = None
        if 0 < feature_bytes <= budget.device and not drawn_tiles:
            self.place = "device"
            self._features = [paddle.empty([count, *shape]) for shape in shapes]
            budget.device -= feature_bytes
        elif feature_bytes <= budget.memory and not drawn_tiles:
            self.place = "memory"
            self._features = [np.empty((count, *shape), np.float32) for shape in shapes]
            budget.memory -= feature_bytes
        elif feature_bytes <= budget.disk and not drawn_tiles and (file := _temporary_file(feature_bytes)) is not None:
            self.place = "file"
            self._features = _map_arrays(file, count, shapes)
            budget.disk -= feature_bytes
        elif picture_bytes <= budget.memory:
            self.place = "pictures"
            self._pictures = np.empty((count, *size, 3), np.uint8)
            budget.memory -= picture_bytes
        else:
            self.place = "nothing"
        if not drawn_tiles:
            self._fill()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def map_size(self) -> tuple[int, int]:
        """See the function of this name."""
        return map_size(self.layout, self._paths)

    def draw(self, state: Sequence[int]) -> None:
        """Where tiles are drawn, choose their places anew: the same for the same state."""
        if self._drawn:
            self._items = self._chosen(state)
            if self._pictures is not None:
                self._fill()

    def _chosen(self, state: Sequence[int]) -> list[tuple[int, Place]]:
        """The items: all, or those that are drawn."""
        rng = np.random.default_rng(state)
        return [
            (i, place)
            for i, tiling in enumerate(self.tilings)
            for place in (tiling.drawn(rng, self._drawn) if self._drawn else tiling.places)
        ]

    def batch(self, indices: np.ndarray) -> list[Tensor]:
        """Features of these items, (B, C, h, w) per scale, on the device."""
        if self.place == "device":
            return [paddle.index_select(maps, paddle.to_tensor(indices)) for maps in self._features]
        if self._features:
            return [paddle.to_tensor(maps[indices]) for maps in self._features]
        if self._pictures is not None:
            return self._compute(self._pictures[indices])
        by_picture = sorted(range(len(indices)), key=lambda row: self._items[indices[row]])
        tiles = np.concatenate(list(self._read_items([self._items[indices[row]] for row in by_picture], len(indices))))
        return self._compute(tiles[np.argsort(by_picture)])

    def batches(self, size: int) -> Iterator[tuple[list[tuple[int, Place]], list[Tensor], list[Tensor]]]:
        """All items in their order: pictures' numbers and places, features, and `kept`; each picture is read once."""
        read = self._read_items(self._items, size) if self.place == "nothing" else None
        for start in range(0, len(self), size):
            indices = np.arange(start, min(start + size, len(self)))
            features = self._compute(next(read)) if read else self.batch(indices)
            yield [self._items[i] for i in indices], features, self.kept(indices)

    def kept(self, indices: np.ndarray) -> list[Tensor]:
        """Of these items the places that count, (B, 1, h, w) of 0 and 1 per scale; nothing where all do.

        A place of a feature map counts where any pixel of its area does, so that thin regions do not vanish.
        """
        if self.layout.roi is None:
            return []
        masks = []
        for number, place in (self._items[i] for i in indices):
            tiling = self.tilings[number]
            masks.append(tiling.cut(tiling.kept, place).astype(np.float32))
        return [
            paddle.to_tensor(
                np.float32([[cv2.resize(mask, (w, h), interpolation=cv2.INTER_AREA) > 0] for mask in masks])
            )
            for _, h, w in self._shapes
        ]

    def _compute(self, pictures: np.ndarray) -> list[Tensor]:
        """(B, H, W, 3) uint8 -> features, (B, C, h, w) per scale."""
        return self._backbone(paddle.to_tensor(normalise(pictures)))

    def _read_items(self, items: Sequence[tuple[int, Place]], size: int) -> Iterator[np.ndarray]:
        """Tiles (B, H, W, 3) uint8 of the items, so many at a time; those of a picture follow each other.

        Whole pictures are read ahead, `size` at a time; of those that are cut, which may be large, few.
        """
        numbers = list(dict.fromkeys(number for number, _ in items))
        ahead = size if self.layout.tile is None else 1
        paths = [self._paths[number] for number in numbers]
        pictures = (p for batch in read_ahead(paths, ahead, self._prepared) for p in batch)
        current, picture, tiles = -1, np.empty(0), []
        for number, place in items:
            if number != current:
                current, picture = number, next(pictures)
            tiles.append(self.tilings[number].cut(picture, place))
            if len(tiles) == size:
                yield np.stack(tiles)
                tiles.clear()
        if tiles:
            yield np.stack(tiles)

    def _prepared(self, path: Path) -> np.ndarray:
        return self.layout.prepare(self._read(path), path)

    def _fill(self) -> None:
        start = 0
        with tqdm(total=len(self), desc=self._description, unit="image", disable=None, leave=False) as bar:
            for pictures in self._read_items(self._items, CACHING_BATCH):
                end = start + len(pictures)
                if self._features:
                    for whole, part in zip(self._features, self._compute(pictures), strict=True):
                        whole[start:end] = part if self.place == "device" else part.numpy()
                elif self._pictures is not None:
                    self._pictures[start:end] = pictures
                bar.update(end - start)
                start = end


def tilings_of(layout: Layout, paths: Sequence[Path]) -> list[Tiling]:
    """The tiles of each picture.

    Raises:
        UserError: a picture cannot be read.
    """
    if layout.input_size:
        return [layout.tiling(layout.input_size)] * len(paths)
    sizes = [upright_size(path) for path in paths]
    known = {size: layout.tiling(size) for size in set(sizes)}
    return [known[size] for size in sizes]


def map_size(layout: Layout, paths: Sequence[Path]) -> tuple[int, int]:
    """Height and width at which maps of these pictures are kept and compared with masks: that of the layout's.

    Where they are not resized it is that of the largest, or less: all of them have `MAP_PIXELS` at most.

    Raises:
        UserError: a picture cannot be read.
    """
    if layout.input_size or not paths:
        return layout.input_size or layout.model_size
    height, width = np.max([upright_size(path) for path in paths], axis=0)
    factor = min(1.0, math.sqrt(MAP_PIXELS / (len(paths) * height * width)))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def must_draw(backbone: nn.Layer, paths: Sequence[Path], layout: Layout, budget: CacheBudget, items: float) -> bool:
    """Whether the features of all tiles do not fit the budget, or a training that sees so many items is over before."""
    count = sum(len(tiling.places) for tiling in tilings_of(layout, paths))
    needed = _feature_bytes(feature_shapes(backbone, layout.model_size), count)
    return needed > max(budget.device, budget.memory, budget.disk) or count > items


def _feature_bytes(shapes: Sequence[Sequence[int]], count: int) -> int:
    return 4 * count * sum(math.prod(shape) for shape in shapes)  # of float32


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
