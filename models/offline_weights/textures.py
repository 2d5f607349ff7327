"""Textures: each class is a way of drawing with fixed parameters, each canvas an instance of it.

A drawing function takes a random generator and its parameters and returns (SIDE, SIDE) float, in any range. Lengths are
in pixels. Neighbouring classes of one family differ by a factor of 1.6 or more in length, since pictures show
canvases larger or smaller by up to 1.25.
"""

import functools
import itertools
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import scipy.fft

SIDE = 192  # of a canvas, pixels
Drawing = Callable[[np.random.Generator], np.ndarray]


def canvas(texture: Drawing, rng: np.random.Generator) -> np.ndarray:
    """An instance of the texture, (SIDE, SIDE) uint8: its 1st percentile is 0, its 99th is 255."""
    drawn = texture(rng).astype(np.float32)
    low, high = np.percentile(drawn[::4, ::4], [1, 99])
    return np.uint8(np.clip((drawn - low) * (255 / max(high - low, 1e-6)), 0, 255))


# ---- noise with a spectrum


@functools.cache
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """(fx, fy) of a real Fourier transform, cycles per pixel: (1, SIDE / 2 + 1) and (SIDE, 1)."""
    along_x, along_y = scipy.fft.rfftfreq(SIDE), scipy.fft.fftfreq(SIDE)
    return along_x[None].astype(np.float32), along_y[:, None].astype(np.float32)


def _filtered(rng: np.random.Generator, amplitude: np.ndarray) -> np.ndarray:
    """Gaussian noise whose spectrum has this amplitude (SIDE, SIDE / 2 + 1); mean 0, deviation 1."""
    white = scipy.fft.rfft2(rng.standard_normal((SIDE, SIDE), np.float32))
    noise = scipy.fft.irfft2(white * amplitude, (SIDE, SIDE))
    return (noise - noise.mean()) / noise.std()


def noise(rng: np.random.Generator, exponent: float, stretch: float = 1.0) -> np.ndarray:
    """Amplitude 1 / f^exponent; `stretch` makes it longer along x by this factor."""
    fx, fy = _frequencies()
    return _filtered(rng, np.maximum(np.hypot(fx * stretch, fy), 1 / SIDE) ** -exponent)


def spots(rng: np.random.Generator, period: float, stretch: float, sharpness: float) -> np.ndarray:
    """Noise of one wavelength: labyrinths of that period, or wood-like fibres when stretched."""
    fx, fy = _frequencies()
    ring = (np.hypot(fx * stretch, fy) * period - 1) / 0.25
    return np.tanh(sharpness * _filtered(rng, np.exp(-(ring**2) / 2)))


def ridges(rng: np.random.Generator, exponent: float, power: float) -> np.ndarray:
    """Bright lines where noise crosses zero: veins and cracks."""
    return np.maximum(1 - np.abs(noise(rng, exponent)), 0) ** power


def marble(rng: np.random.Generator, period: float, bend: float) -> np.ndarray:
    """A sine wave, bent by smooth noise of `bend` periods."""
    x, _ = _grid()
    return np.sin(2 * np.pi * (x / period + bend * noise(rng, 2.2)))


# ---- regular patterns


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """(x, y), each (SIDE, SIDE) float32."""
    along = np.arange(SIDE, dtype=np.float32)
    x, y = np.meshgrid(along, along)
    return x, y


def _bent(rng: np.random.Generator, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """The grid, displaced by smooth noise of this deviation in pixels."""
    x, y = _grid()
    return x + shift * noise(rng, 2.5), y + shift * noise(rng, 2.5)


def _bar(position: np.ndarray, width: float) -> np.ndarray:
    """1 where the position, in periods, is within `width` / 2 of a whole number, soft at the edges."""
    return 1 / (1 + np.exp(20 * (np.abs(position - np.round(position)) - width / 2)))


def stripes(rng: np.random.Generator, period: float, width: float) -> np.ndarray:
    """Bars that take `width` of the period, slightly bent."""
    x, _ = _bent(rng, 0.15 * period)
    return _bar(x / period, width)


def mesh(rng: np.random.Generator, period: float, width: float) -> np.ndarray:
    """Two sets of bars at right angles: grids and nets."""
    x, y = _bent(rng, 0.1 * period)
    return np.maximum(_bar(x / period, width), _bar(y / period, width))


def checks(rng: np.random.Generator, period: float) -> np.ndarray:
    """A chessboard."""
    x, y = _bent(rng, 0.08 * period)
    return np.tanh(6 * np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period))


def dots(rng: np.random.Generator, period: float, radius: float) -> np.ndarray:
    """Round dots on a square lattice; the radius counts periods."""
    x, y = _bent(rng, 0.1 * period)
    u, v = x / period, y / period
    return 1 / (1 + np.exp(20 * (np.hypot(u - np.round(u), v - np.round(v)) - radius)))


def weave(rng: np.random.Generator, period: float, over: int) -> np.ndarray:
    """Cloth: threads that pass over `over` others and under as many, each with a shade of its own."""
    x, y = _bent(rng, 0.05 * period)
    column, row = np.floor(x / period).astype(int), np.floor(y / period).astype(int)
    shades = rng.uniform(0.7, 1.0, (2, 256))
    warp = np.abs(np.sin(np.pi * x / period)) * shades[0, column % 256]
    weft = np.abs(np.sin(np.pi * y / period)) * shades[1, row % 256]
    return np.where((column + row) % (2 * over) < over, warp, weft)


def bricks(rng: np.random.Generator, period: float, length: float) -> np.ndarray:
    """Rows of stones, each with a shade, every second row shifted by half a stone; `length` counts periods."""
    x, y = _bent(rng, 0.05 * period)
    v = y / period
    u = x / (length * period) + 0.5 * (np.floor(v) % 2)
    shades = rng.uniform(0.5, 1.0, 997)[(np.floor(u) * 31 + np.floor(v) * 17).astype(int) % 997]
    joint = np.maximum(_bar(u, 0.16 / length), _bar(v, 0.16))
    return shades * (1 - joint)


# ---- scattered things


def cells(rng: np.random.Generator, period: float, kind: str) -> np.ndarray:
    """Voronoi cells around random points, one per period^2: their shade, the distance to the point, or their edges."""
    count = int((SIDE / period) ** 2)
    ground = np.full((SIDE, SIDE), 255, np.uint8)
    ground[rng.integers(0, SIDE, count), rng.integers(0, SIDE, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        ground, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    if kind == "distance":
        return distance
    shades = rng.uniform(0, 1, count + 1)[labels].astype(np.float32)
    if kind == "shade":
        return shades
    edges = np.uint8(cv2.morphologyEx(shades, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0)
    return cv2.GaussianBlur(np.float32(edges), (0, 0), max(period / 16, 0.6))


def leaves(rng: np.random.Generator, smallest: float, largest: float) -> np.ndarray:
    """Dead leaves: discs over one another, numbers falling as 1 / radius^3 (Ruderman 1997)."""
    drawn = np.zeros((SIDE, SIDE), np.float32)
    # enough that they cover the canvas about twice
    u = rng.uniform(0, 1, int(2 * SIDE**2 / (2 * np.pi * smallest**2 * np.log(largest / smallest)))).astype(np.float32)
    radii = 1 / np.sqrt(1 / smallest**2 - u * (1 / smallest**2 - 1 / largest**2))
    return _discs(rng, drawn, radii)


def pebbles(rng: np.random.Generator, radius: float, cover: float) -> np.ndarray:
    """Discs of one size on an even ground, in number such that they would cover this part of it side by side."""
    drawn = np.zeros((SIDE, SIDE), np.float32)
    return _discs(rng, drawn, np.full(int(cover * SIDE**2 / (np.pi * radius**2)), radius))


def _discs(rng: np.random.Generator, drawn: np.ndarray, radii: np.ndarray) -> np.ndarray:
    centres = rng.integers(0, SIDE * 16, (len(radii), 2)).tolist()
    shades = rng.uniform(0.3, 1.0, len(radii)).tolist()
    for centre, radius, shade in zip(centres, (radii * 16).astype(int).tolist(), shades, strict=True):
        cv2.circle(drawn, centre, radius, shade, -1, cv2.LINE_8, 4)
    return drawn


def hairs(rng: np.random.Generator, length: float, count: int, spread: float) -> np.ndarray:
    """Curved lines in directions that differ by `spread` radians: fur, grass, scratches, felt."""
    drawn = np.zeros((SIDE, SIDE), np.uint8)
    start = rng.uniform(-length, SIDE, (count, 2))
    direction = rng.normal(0, spread, count)
    steps = np.linspace(0, 1, 6)
    angle = direction[:, None] + rng.normal(0, 0.6, count)[:, None] * steps  # (count, 6)
    heading = np.stack([np.cos(angle), np.sin(angle)], axis=2)
    points = np.round((start[:, None] + np.cumsum(heading, axis=1) * (length / 6)) * 16).astype(np.int32)
    for line, shade in zip(points, rng.integers(90, 256, count).tolist(), strict=True):
        cv2.polylines(drawn, [line], False, shade, 1, cv2.LINE_AA, 4)
    return drawn


def fractal(rng: np.random.Generator, code: int) -> np.ndarray:
    """The attractor of four random contractions of the plane (an iterated function system), drawn by the chaos game.

    The class fixes the contractions; instances move them a little.
    """
    own = np.random.default_rng(code)
    turn = own.uniform(0, 2 * np.pi, 4)
    shrink = own.uniform(0.35, 0.6, (4, 1, 1))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]).transpose(2, 0, 1)
    maps = shrink * rotation + rng.normal(0, 0.03, (4, 2, 2))  # (4, 2, 2)
    shifts = own.uniform(-1, 1, (4, 2)) + rng.normal(0, 0.03, (4, 2))
    points = rng.uniform(-1, 1, (4000, 2))
    visits = []
    for i in range(14):
        chosen = rng.integers(0, 4, len(points))
        points = np.einsum("nij,nj->ni", maps[chosen], points) + shifts[chosen]
        if i >= 6:  # close to the attractor by then
            visits.append(points)
    visited = np.concatenate(visits)
    low, high = np.percentile(visited, [1, 99], axis=0)
    x, y = np.clip((visited - low) / (high - low) * (SIDE - 1), 0, SIDE - 1).astype(int).T
    counts = np.bincount(y * SIDE + x, minlength=SIDE**2).reshape(SIDE, SIDE)
    return np.log1p(cv2.GaussianBlur(np.float32(counts), (0, 0), 0.8))


# ---- the classes


def _classes(drawing: Callable[..., np.ndarray], **choices: Iterable[object]) -> list[Drawing]:
    """The drawing with each combination of these parameters."""
    return [
        functools.partial(drawing, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


# the first one is as good as plain: the smoothest shading there is
TEXTURES: tuple[Drawing, ...] = (
    *_classes(noise, exponent=[4.0]),
    *_classes(noise, exponent=[0.0, 0.7, 1.3, 2.0], stretch=[1, 4]),
    *_classes(spots, period=[4, 7, 12, 21], stretch=[1, 3], sharpness=[0.5, 3]),
    *_classes(ridges, exponent=[1.2, 1.8], power=[2, 8]),
    *_classes(marble, period=[8, 16, 32], bend=[0.15, 0.5]),
    *_classes(stripes, period=[4, 7, 12, 21], width=[0.25, 0.5]),
    *_classes(mesh, period=[5, 8, 14, 24], width=[0.2, 0.6]),
    *_classes(checks, period=[5, 8, 14, 24]),
    *_classes(dots, period=[5, 8, 14, 24], radius=[0.22, 0.4]),
    *_classes(weave, period=[4, 7, 12], over=[1, 2]),
    *_classes(bricks, period=[5, 9, 16], length=[1.0, 2.2]),
    *_classes(cells, period=[6, 11, 20], kind=["shade", "distance", "edges"]),
    *_classes(leaves, smallest=[1.5, 4], largest=[12, 40]),
    *_classes(pebbles, radius=[1.2, 2.2, 4, 7], cover=[0.15, 0.6]),
    *_classes(hairs, length=[12, 40], count=[150, 600], spread=[0.15, 3.0]),
    *_classes(fractal, code=range(10)),
)
