"""Outlines: the shapes that pictures are made of, from large things to scratches and specks.

Each function draws one instance: polygons (K, 2) float within the unit disc. Where polygons overlap there is a hole.
"""

import numpy as np

Polygons = list[np.ndarray]


def _around(radius: np.ndarray) -> np.ndarray:
    """The closed curve with this radius (K,) at evenly spaced angles, (K, 2); at most 1 from the middle."""
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * (radius / radius.max())[:, None]


def _box(aspect: float) -> np.ndarray:
    corners = np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]])
    return corners / np.hypot(1, aspect)


def ellipse(rng: np.random.Generator) -> Polygons:
    """Also a circle."""
    return [_around(np.ones(40)) * [1, rng.uniform(0.45, 1)]]


def ring(rng: np.random.Generator) -> Polygons:
    """A circle with a round hole."""
    outer = _around(np.ones(40))
    return [outer, outer * rng.uniform(0.4, 0.85)]


def box(rng: np.random.Generator) -> Polygons:
    """A rectangle."""
    return [_box(rng.uniform(0.25, 1))]


def frame(rng: np.random.Generator) -> Polygons:
    """A rectangle with a rectangular hole."""
    outer = _box(rng.uniform(0.5, 1))
    return [outer, outer * rng.uniform(0.4, 0.8)]


def triangle(rng: np.random.Generator) -> Polygons:
    """Any but the flattest."""
    return [_around(np.ones(3)) + rng.uniform(-0.25, 0.25, (3, 2))]


def polygon(rng: np.random.Generator) -> Polygons:
    """Five to seven corners."""
    return [_around(np.ones(rng.integers(5, 8)))]


def star(rng: np.random.Generator) -> Polygons:
    """Four to eight points."""
    return [_around(np.tile([1, rng.uniform(0.25, 0.55)], rng.integers(4, 9)))]


def gear(rng: np.random.Generator) -> Polygons:
    """Six to fourteen teeth, perhaps with an axle hole."""
    depth = rng.uniform(0.7, 0.88)
    outer = _around(np.tile([1, 1, depth, depth], rng.integers(6, 15)))
    return [outer, _around(np.ones(24)) * 0.3][: rng.integers(1, 3)]


def flower(rng: np.random.Generator) -> Polygons:
    """Three to seven round petals."""
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    return [_around(1 + rng.uniform(0.2, 0.4) * np.cos(rng.integers(3, 8) * angle))]


def cross(rng: np.random.Generator) -> Polygons:
    """A plus sign."""
    w = rng.uniform(0.15, 0.4)
    quarter = np.array([[w, w], [w, 1], [-w, 1]])
    turns = [np.linalg.matrix_power([[0, -1], [1, 0]], i) for i in range(4)]
    return [np.concatenate([quarter @ turn.T for turn in turns])]


def crescent(rng: np.random.Generator) -> Polygons:
    """A moon."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20)
    outer = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return [np.concatenate([outer, outer[::-1] * [rng.uniform(0.1, 0.75), 1]])]


def blob(rng: np.random.Generator) -> Polygons:
    """A stain: a circle with random bulges."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    waves = sum(rng.normal(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 8))
    return [_around(np.maximum(1 + waves, 0.15))]


def splinter(rng: np.random.Generator) -> Polygons:
    """A shard: a few corners at random radii."""
    return [_around(rng.uniform(0.2, 1, rng.integers(4, 8)))]


def specks(rng: np.random.Generator) -> Polygons:
    """Three to nine tiny discs."""
    centres = rng.uniform(-0.8, 0.8, (rng.integers(3, 10), 1, 2))
    return list(centres + _around(np.ones(8)) * rng.uniform(0.05, 0.18, (len(centres), 1, 1)))


def _stroke(line: np.ndarray, width: float) -> np.ndarray:
    """A polyline (K, 2) made `width` wide, thinner towards its end; scaled into the unit disc."""
    line = line - line.mean(axis=0)
    line = line / np.hypot(*line.T).max()
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= width / 2 / np.maximum(np.hypot(*along.T), 1e-6)[:, None] * np.linspace(1, 0.4, len(line))[:, None]
    return np.concatenate([line + across, (line - across)[::-1]])


def scratch(rng: np.random.Generator) -> Polygons:
    """A straight thin line, or two or three that run alike."""
    line = np.array([[-1.0, 0], [0, rng.normal(0, 0.04)], [1, 0]])
    offsets = np.array([[[0, 0]], [[0, 0.3]], [[0, 0.6]]])  # (3, 1, 2)
    return list(_stroke(line, rng.uniform(0.03, 0.12)) + offsets[: rng.integers(1, 4)])


def thread(rng: np.random.Generator) -> Polygons:
    """A curved thin line."""
    heading = rng.normal(0, 1.5) * np.linspace(-1, 1, 30) + rng.normal(0, 1.2) * np.linspace(-1, 1, 30) ** 2
    return [_stroke(np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0), rng.uniform(0.05, 0.15))]


def crack(rng: np.random.Generator) -> Polygons:
    """A jagged thin line."""
    heading = rng.normal(0, 0.8, 14)
    return [_stroke(np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0), rng.uniform(0.04, 0.14))]


OUTLINES = (
    ellipse, ring, box, frame, triangle, polygon, star, gear, flower, cross, crescent, blob, splinter, specks,
    scratch, thread, crack,
)  # fmt: skip
