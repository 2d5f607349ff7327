"""How a picture goes through a model: resized or as it is, whole or in tiles, all of it or a region of interest.

The tiles of a picture lie in rows and columns, a fixed step apart, the last ones flush with its edges. Of the raw maps
that the model makes of them the whole picture's is the weighted mean. A tile's weight falls towards its edges, where
it knows least of what surrounds a pixel, as sin^2 (a Hann window) along both sides; so no seam shows. The whole map is
smoothed and scored like that of a picture which is not cut.

What is black in a region of interest is painted over before the model sees it, and its map is 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from deploy.common.cli import UserError
from deploy.common.imaging import MEAN, read_mask, resize

ORIGINAL = "original"  # an input_size: pictures are not resized
OVERLAP = 0.25
ROI_FILE = "roi.png"
SMOOTHING_SIGMA = 6.0  # pixels of the anomaly map, as published
PAINT = np.uint8(np.rint(255 * np.float64(MEAN)))  # over what does not count: 0 to the model, but for rounding
SAME_SHAPE = 0.02  # by which the aspect ratio of a region of interest may differ from a picture's

Place = tuple[int, int]  # y and x of a tile's left upper pixel
Run = Callable[[np.ndarray], np.ndarray]  # tiles (B, H, W, 3) uint8 RGB -> their raw anomaly maps (B, H, W) float32


@dataclass(frozen=True, eq=False)
class Layout:
    """What is done with the pictures of one model."""

    input_size: tuple[int, int] | None  # height and width that they are resized to; None: they are not
    tile: tuple[int, int] | None = None  # height and width; None: a picture is not cut
    overlap: float = OVERLAP  # of neighbouring tiles, as a share of their sides
    score_pixels: int = 1  # how many of the largest values of a map its score is the mean of
    sigma: float = SMOOTHING_SIGMA
    roi: np.ndarray | None = None  # (h, w) bool, in the shape of the pictures; None: all of a picture counts

    @classmethod
    def of(cls, description: Mapping[str, Any], folder: Path) -> "Layout":
        """That of an exported model, by the `inference.yml` and the files of its folder.

        Raises:
            UserError: the region of interest cannot be read.
        """
        size, tile, share = (description[key] for key in ("input_size", "tile", "top_share"))
        area = math.prod(tile or size)
        return cls(
            None if size == ORIGINAL else tuple(size),
            tile and tuple(tile),
            description["tile_overlap"],
            1 if share is None else score_pixels(share, area),
            description["smoothing_sigma"],
            read_roi(folder / ROI_FILE) if ROI_FILE in description["sha256"] else None,
        )

    @property
    def plain(self) -> bool:
        """Whether what the model itself says of a picture, map and score, is what holds of it."""
        return self.tile is None and self.roi is None

    @property
    def model_size(self) -> tuple[int, int]:
        """Height and width of what the model takes."""
        return self.tile or self.input_size

    def size_of(self, picture: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which a picture of this size goes through the model, and of its map."""
        return self.input_size or picture

    def check_roi(self, picture: tuple[int, int], name: str | Path = "the picture") -> None:
        """Compare the region of interest with the picture's height and width; errors name the picture.

        Raises:
            UserError: they have not the same aspect ratio.
        """
        if self.roi is None:
            return
        (height, width), (h, w) = self.roi.shape, picture
        if abs(height * w / (width * h) - 1) > SAME_SHAPE and abs(height * w - width * h) > max(height, width, h, w):
            raise UserError(
                f"{name}: {w}x{h} is another aspect ratio than that of the region of interest, {width}x{height} "
                f"({ROI_FILE}); make both of the same view"
            )

    def prepare(self, picture: np.ndarray, name: str | Path = "the picture") -> np.ndarray:
        """(h, w, 3) uint8 RGB -> the same as it is cut: resized, and painted over where it does not count.

        Raises:
            UserError: as `check_roi`.
        """
        self.check_roi(picture.shape[:2], name)
        return self.paint(picture if self.input_size is None else resize(picture, *self.input_size))

    def paint(self, picture: np.ndarray) -> np.ndarray:
        """The picture, where there is a region of interest a copy that is painted over outside of it."""
        kept = kept_part(self.roi, picture.shape[:2])
        if kept is not None:
            picture = picture.copy()
            picture[~kept] = PAINT
        return picture

    def tiling(self, size: tuple[int, int]) -> "Tiling":
        """The tiles of a prepared picture of this height and width; it is the only one where there are no tiles."""
        return Tiling(size, self.tile or size, self.overlap, kept_part(self.roi, size))

    def look(self, pictures: Sequence[np.ndarray], run: Run, batch_size: int) -> list[tuple[np.ndarray, float]]:
        """Score prepared pictures, so many tiles a run.

        Args:
            pictures, run, batch_size: as in `raw_maps`.

        Returns:
            of each picture its smoothed map, (h, w) float32 in [0, 1], and its score in [0, 1].
        """
        raw_maps = self.raw_maps(pictures, run, batch_size)
        return [self.finish(raw, kept_part(self.roi, raw.shape)) for raw in raw_maps]

    def raw_maps(self, pictures: Sequence[np.ndarray], run: Run, batch_size: int) -> list[np.ndarray]:
        """The maps of prepared pictures before smoothing, (h, w) float32; beside these it takes the tiles of a batch.

        Args:
            pictures: (h, w, 3) uint8 RGB, what `prepare` has made.
            run: makes raw maps of tiles.
            batch_size: the most tiles a run.
        """
        tilings = [self.tiling(picture.shape[:2]) for picture in pictures]
        maps = [tiling.blank() for tiling in tilings]
        work = [(i, place) for i, tiling in enumerate(tilings) for place in tiling.places]
        for start in range(0, len(work), batch_size):
            batch = work[start : start + batch_size]
            raw = run(np.stack([tilings[i].cut(pictures[i], place) for i, place in batch]))
            for (i, place), own in zip(batch, raw, strict=True):
                tilings[i].add(maps[i], place, own)
        return maps

    def finish(self, raw: np.ndarray, kept: np.ndarray | None) -> tuple[np.ndarray, float]:
        """Smoothed map and score of a whole picture's raw map (h, w) float32, which is smoothed in its place.

        Where a region of interest counts alone, `kept`, smoothing is the weighted mean of what lies in it.
        """
        np.clip(raw, 0, 1, out=raw)  # of ones the shares' sum may be a little more
        if kept is not None:
            raw *= kept
        score = self.score(raw, kept)
        _smooth(raw, self.sigma)
        if kept is not None:
            raw /= np.maximum(_smooth(kept.astype(np.float32), self.sigma), 1e-6)
            raw *= kept
        return np.clip(raw, 0, 1, out=raw), score

    def score(self, raw: np.ndarray, kept: np.ndarray | None = None) -> float:
        """The image score of a whole raw map, the mean of its largest values; see `models.fastflow.image_score`."""
        pixels = min(self.score_pixels, raw.size if kept is None else np.count_nonzero(kept))
        if pixels == 1:
            return float(raw.max())
        return float(np.partition(raw, -pixels, axis=None)[-pixels:].mean(dtype=np.float64))


class Tiling:
    """Where the tiles of a picture lie, and what each one counts at each pixel."""

    def __init__(
        self, size: tuple[int, int], tile: tuple[int, int], overlap: float, kept: np.ndarray | None = None
    ) -> None:
        """
        Args:
            size: height and width of the picture, in pixels. A picture that is smaller than a tile is mirrored beyond
                its right and lower edge until it is as large.
            tile: height and width of a tile.
            overlap: of neighbouring tiles, as a share of their sides; in [0, 1).
            kept: (height, width) bool, the pixels that count; tiles without any are left out. None: all do.
        """
        self.size, self.tile, self.kept = size, tile, kept
        self._rows, self._columns = (_shares(*sides, overlap) for sides in zip(size, tile, strict=True))
        self.places: list[Place] = [(y, x) for y in self._rows for x in self._columns if self._counts((y, x))]

    def _counts(self, place: Place) -> bool:
        return self.kept is None or bool(self.part(self.kept, place).any())

    def drawn(self, rng: np.random.Generator, count: int) -> list[Place]:
        """So many places at random, not more than there are in `places`, of tiles with pixels that count."""
        found: list[Place] = []
        room = [max(side - part, 0) + 1 for side, part in zip(self.size, self.tile, strict=True)]
        for _ in range(min(count, len(self.places))):
            tried = ((int(rng.integers(room[0])), int(rng.integers(room[1]))) for _ in range(100))
            found.append(next(filter(self._counts, tried), None) or self.places[rng.integers(len(self.places))])
        return found

    def part(self, array: np.ndarray, place: Place) -> np.ndarray:
        """A view of the array (height, width, ...) where a tile at this place lies; at most as large as a tile."""
        y, x = place
        return array[y : y + self.tile[0], x : x + self.tile[1]]

    def cut(self, array: np.ndarray, place: Place) -> np.ndarray:
        """The tile at this place, mirrored where the picture is smaller than a tile."""
        part = self.part(array, place)
        if part.shape[:2] == tuple(self.tile):
            return part
        beyond = [(0, side - length) for side, length in zip(self.tile, part.shape[:2], strict=True)]
        return np.pad(part, beyond + [(0, 0)] * (array.ndim - 2), mode="symmetric")

    def blank(self) -> np.ndarray:
        """(height, width) float32: a map to which `add` has added nothing yet."""
        return np.zeros(self.size, np.float32)

    def add(self, whole: np.ndarray, place: Place, raw: np.ndarray) -> None:
        """Add a tile's map to the whole one; all together are the weighted mean. Only places of `places` have one."""
        rows, columns = self._rows[place[0]][:, None], self._columns[place[1]]
        whole_part = self.part(whole, place)
        whole_part += raw[: len(rows), : len(columns)] * rows * columns


def _shares(length: int, tile: int, overlap: float) -> dict[int, np.ndarray]:
    """Of one axis: by the first pixel of each tile what it counts at its pixels, float32; at each pixel all are 1."""
    last, step = max(length - tile, 0), max(round(tile * (1 - overlap)), 1)
    weight = np.sin(np.pi * (np.arange(min(tile, length)) + 0.5) / tile) ** 2
    starts = [*range(0, last, step), last]
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += weight
    return {start: (weight / total[start : start + tile]).astype(np.float32) for start in starts}


def _smooth(raw: np.ndarray, sigma: float, truncate: float = 4.0) -> np.ndarray:
    """Gaussian smoothing in place, as `models.linear_maps.gaussian_matrix` does it."""
    radius = int(truncate * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    return cv2.sepFilter2D(raw, cv2.CV_32F, kernel, kernel, dst=raw, borderType=cv2.BORDER_REFLECT)


def score_pixels(share: float, area: int) -> int:
    """How many values the mean of the largest is of: a share of the area of what the model takes, in pixels."""
    return max(1, round(share * area))


def read_roi(path: Path, content: BinaryIO | None = None) -> np.ndarray:
    """A region of interest, (h, w) bool: what is nearer to white counts. `content` is read in place of the file.

    Raises:
        UserError: it cannot be read, or nothing in it is white.
    """
    roi = read_mask(path, content) >= 128
    if not roi.any():
        raise UserError(f"{path}: nothing in this region of interest is white, so no pixel would count; paint it white")
    return roi


def kept_part(roi: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """A region of interest at this height and width, bool; None: there is none.

    Raises:
        UserError: nothing is left of it.
    """
    if roi is None or roi.shape == tuple(size):
        return roi
    kept = resize(255 * roi.astype(np.uint8), *size) >= 128
    if not kept.any():
        raise UserError(f"{ROI_FILE}: nothing of this region of interest is left at {size[1]}x{size[0]}; widen it")
    return kept
