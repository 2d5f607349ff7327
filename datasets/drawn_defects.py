"""Defects drawn on good pictures, to learn what a model can find before there is a true one.

All lengths are in pixels of the picture that is drawn on. A defect's size is its longest extent. Its contrast is the
mean change of its pixels, in the channel that changes most, as a share of the way from black to white.
"""

import math

import cv2
import numpy as np

KINDS = {
    "scratch": "a bent line, a tenth as wide as it is long, brighter, darker or of another colour",
    "blob": "an irregular spot, brighter, darker or of another colour",
    "piece": "a spot of another place, of the same picture or of another one",
    "smear": "a spot whose texture is smeared in one direction",
}
PLACES = 30  # that are tried for a piece or a smear: most of a smooth picture is like the rest of it
CORNERS = 32  # of an outline
SUBPIXEL = 4  # bits behind the point in OpenCV's coordinates


def draw_defect(
    rng: np.random.Generator, picture: np.ndarray, other: np.ndarray, kind: str, size: float, contrast: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """A picture with one defect at a random place, wholly inside of it.

    Args:
        rng: what is drawn depends on it and on the other arguments alone.
        picture: (H, W, 3) uint8, of a good part; it stays as it is.
        other: (h, w, 3) uint8, where half of the pieces come from; may be `picture` itself.
        kind: a key of `KINDS`.
        size: longest extent, from 1.
        contrast: in (0, 1].

    Returns:
        the picture, (H, W, 3) uint8, and where it was changed, (H, W) float32 in [0, 1], 1 inside of the defect and
        less on its rim; None where the defect does not fit in, or no place that was tried can change so much.
    """
    side = math.ceil(size) + 2
    height, width = picture.shape[:2]
    if side > min(height, width):
        return None
    shape = _scratch(rng, size) if kind == "scratch" else _spot(rng, size)
    cover = _filled(shape - (shape.min(axis=0) + shape.max(axis=0)) / 2 + (side - 1) / 2, side)
    source = other if rng.random() < 0.5 and min(other.shape[:2]) >= side else picture
    along = rng.random() < 0.5
    searched = kind in ("piece", "smear")
    for _ in range(PLACES if searched else 1):
        here, there = _somewhere(rng, picture, side), _somewhere(rng, source, side)
        # Most places are given up for what each n-th of their pixels says: large ones would take long.
        for stride in sorted({max(side // 64, 1) if searched else 1, 1}, reverse=True):
            part, inside = (array[::stride, ::stride].astype(np.float32) for array in (picture[here], cover))
            if kind == "piece":
                changed = source[there][::stride, ::stride]
            elif kind == "smear":
                changed = _smeared(part, along)
            else:
                changed = _tinted(rng, part, inside, 255 * contrast)
            change = changed - part
            strength = float((np.abs(change).max(axis=2) * inside).sum() / inside.sum()) / 255
            if strength < 0.9 * contrast:
                break
        else:
            drawn, mask = picture.copy(), np.zeros((height, width), np.float32)
            drawn[here] = np.rint(np.clip(part + cover[..., None] * change * min(contrast / strength, 1), 0, 255))
            mask[here] = cover
            return drawn, mask
    return None


def _filled(outline: np.ndarray, side: int) -> np.ndarray:
    """How much of each pixel lies within the outline (n, 2) of x and y: (side, side) float32 in [0, 1]."""
    cover = np.zeros((side, side), np.uint8)
    cv2.fillPoly(cover, np.rint(outline * 2**SUBPIXEL).astype(np.int32)[None], 255, cv2.LINE_AA, SUBPIXEL)
    return cover.astype(np.float32) / 255


def _spot(rng: np.random.Generator, size: float) -> np.ndarray:
    """The outline of an irregular spot, (n, 2)."""
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    reach = np.ones(CORNERS)
    for waves in (2, 3, 5):
        reach += rng.uniform(0, 0.35) / math.sqrt(waves) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    outline = reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    longest = np.linalg.norm(outline[:, None] - outline, axis=2).max()
    return outline * (max(size - 1, 0.5) / longest)  # pixels are as wide as the distance of their centres


def _scratch(rng: np.random.Generator, size: float) -> np.ndarray:
    """The outline of a bent line that thins out to its ends, (n, 2)."""
    way = np.linspace(-0.5, 0.5, CORNERS // 2)
    bend, direction = rng.uniform(-0.4, 0.4), rng.uniform(0, np.pi)
    middle = np.stack([way, bend * (way**2 - 1 / 12)], axis=1) * max(size - 1, 0.5)
    half = max(size / 10 - 1, 0.2) / 2 * np.sqrt(1 - (2 * way) ** 2)
    outline = np.concatenate([middle + half[:, None] * (0, 1), (middle - half[:, None] * (0, 1))[::-1]])
    turn = np.array([[np.cos(direction), np.sin(direction)], [-np.sin(direction), np.cos(direction)]])
    return outline @ turn


def _tinted(rng: np.random.Generator, patch: np.ndarray, cover: np.ndarray, change: float) -> np.ndarray:
    """The patch, brighter or darker by so much, or of another colour if it has any; whichever has the room."""
    tint = np.ones(3)
    if np.ptp(patch, axis=2).max() > 0 and rng.random() < 0.5:
        tint = rng.uniform(-1, 1, 3)
        tint /= np.abs(tint).max()
    ways = [np.clip(patch + sign * change * tint.astype(np.float32), 0, 255) for sign in rng.permutation([-1, 1])]
    moved = [float((np.abs(way - patch).max(axis=2) * cover).sum()) for way in ways]
    return ways[0] if moved[0] >= 0.9 * change * cover.sum() else ways[int(np.argmax(moved))]


def _somewhere(rng: np.random.Generator, picture: np.ndarray, side: int) -> tuple[slice, slice]:
    """A square of the picture."""
    y, x = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    return slice(y, y + side), slice(x, x + side)


def _smeared(patch: np.ndarray, along: bool) -> np.ndarray:
    """The patch, averaged along its rows, or along its columns."""
    length = 2 * (len(patch) // 3) + 1
    return cv2.blur(patch, (length, 1) if along else (1, length))
