"""Draw a small MVTec-like data set: a dark glass bottle seen from above, good and damaged.

    python -m datasets.lite_data --output ./lite_data --images ./images --seed 0

Every picture is computed from geometry and a random generator seeded by (seed, split, index), so
the same seed always gives the same files. Lengths are in pixels of the 256 x 256 picture, angles
in radians, colours are BGR (OpenCV's order) with 0 black and 1 white. Scenes are drawn on a grid
SUPERSAMPLE times finer than the picture, which is what makes their edges smooth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from deploy.common.cli import ArgumentParser, run_main
from deploy.common.files import write_whole

SIZE = 256  # side of a picture
SUPERSAMPLE = 2
BLUR_SIGMA = 0.55  # of the lens, in pixels
BLUR_RADIUS = 3  # a defect changes no pixel farther than this from its mask

HOLE_RADIUS = 52.0  # where the neck opens to the dark inside
AMBER_RADIUS = 86.0  # where light from below shines through the rim
MOUTH_RADIUS = 91.0  # inside: the mouth, in focus; outside: the body, farther from the lens
BODY_RADIUS = 110.0

# Brightness of the glass by distance from the axis: (radius, level) knots, linear in between.
MOUTH_PROFILE = (
    (0, 0.085), (30, 0.070), (50.5, 0.062), (52, 0.17), (55, 0.25), (57, 0.13), (60, 0.10),
    (69, 0.12), (71, 0.21), (75, 0.28), (79, 0.22), (80, 0.13), (82, 0.20), (84, 0.29),
    (88, 0.27), (90, 0.16), (94, 0.24),
)  # fmt: skip
BODY_PROFILE = (
    (86, 0.26), (91, 0.24), (95, 0.16), (98, 0.25), (101, 0.41), (103, 0.30), (106, 0.13),
    (110, 0.17), (114, 0.45),
)  # fmt: skip

# Reflections: (radius, its sigma, direction from the lamp, its sigma, strength).
BODY_REFLECTIONS = ((101.5, 1.6, 0.3, 0.7, 0.16), (101.5, 1.8, 2.9, 0.9, 0.10))
LIP_REFLECTIONS = (
    (73.0, 0.7, 2.2, 0.9, 0.16), (76.5, 0.6, 2.6, 0.6, 0.22), (78.5, 0.5, -0.2, 0.7, 0.14),
    (82.0, 0.5, 0.4, 1.1, 0.16), (54.0, 0.7, 3.0, 1.0, 0.12), (89.3, 0.5, -1.2, 1.3, 0.14),
)  # fmt: skip
GLINTS = (
    (AMBER_RADIUS + 0.6, 0.9, 0.35, 0.060, 0.75), (AMBER_RADIUS - 0.6, 0.9, 0.62, 0.035, 0.55),
    (77.0, 0.9, 2.75, 0.070, 0.50), (79.5, 0.9, -1.9, 0.030, 0.35),
)  # fmt: skip

GLASS = np.array([1.10, 1.00, 1.00])
AMBER = np.array([0.16, 0.34, 0.72])
WARM_WHITE = np.array([0.74, 0.93, 1.00])

COUNTS = {
    "train/good": 24,
    "test/good": 8,
    "test/broken_large": 6,
    "test/broken_small": 6,
    "test/contamination": 6,
}
EXAMPLES = {"bottle_good.png": "images/good", "bottle_bad.png": "images/broken_large"}
SPLITS = (*COUNTS, *EXAMPLES.values())  # a split's place here is part of its pictures' seed

Defect = tuple[np.ndarray, np.ndarray]  # its mask and its colour, both on the fine grid


@dataclass(frozen=True)
class Pose:
    """How one bottle stands before the camera: what differs between normal pictures."""

    centre: np.ndarray  # (x, y) of the body's axis, pixels
    mouth: np.ndarray  # (x, y) of the mouth's axis: the lens sees it slightly shifted
    scale: float  # size relative to the nominal radii, about 1
    spin: float  # rotation about the axis, radians
    light: float  # direction that the light comes from, radians
    strength: float  # exposure, about 1


@dataclass(frozen=True)
class Sample:
    """One drawn picture, with what a test needs to check that its mask is exact."""

    picture: np.ndarray  # (SIZE, SIZE, 3) uint8, as written
    mask: np.ndarray  # (SIZE, SIZE) uint8, 255 where the defect is
    flawless: np.ndarray  # (SIZE, SIZE, 3) float, the same scene with no defect and no noise
    damaged: np.ndarray  # (SIZE, SIZE, 3) float, the same with the defect


def draw_pose(rng: np.random.Generator) -> Pose:
    """A bottle within about 2 pixels of the middle, 1 % of its size, lit from the upper right."""
    centre = (SIZE - 1) / 2 + rng.uniform(-2.0, 2.0, 2)
    return Pose(
        centre=centre,
        mouth=centre + rng.uniform(-1.0, 1.0, 2),
        scale=rng.uniform(0.99, 1.01),
        spin=rng.uniform(-0.15, 0.15),
        light=-0.8 + rng.uniform(-0.2, 0.2),  # y points down: from the upper right
        strength=rng.uniform(0.95, 1.05),
    )


def fine_grid() -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the fine grid's samples, in pixels of the picture; pixel 0 has its centre at 0."""
    along = (np.arange(SIZE * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - 0.5
    return np.meshgrid(along, along)


def polar(centre: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Fine grid's distance from `centre` (nominal pixels) and direction (radians, y downwards)."""
    x, y = fine_grid()
    x, y = x - centre[0], y - centre[1]
    return np.hypot(x, y) / scale, np.arctan2(y, x)


def step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step: 0 below `low`, 1 above `high`."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def ring(radius: np.ndarray, at: float, width: float) -> np.ndarray:
    """Soft ring of radius `at`: 1 on it, falling off as a Gaussian of sigma `width`."""
    return np.exp(-0.5 * ((radius - at) / width) ** 2)


def arc(radius: np.ndarray, angle: np.ndarray, at: float, width: float, towards: float, spread: float) -> np.ndarray:
    """Soft arc: 1 at radius `at` in direction `towards`, Gaussian both ways, of sigma `width`
    pixels across it and (nearly, as it closes on itself) `spread` radians along it."""
    across = -0.5 * ((radius - at) / width) ** 2
    return np.exp(across + (np.cos(angle - towards) - 1) / spread**2)


def around(rng: np.random.Generator, angle: np.ndarray, cells: int) -> np.ndarray:
    """Noise in -1..1 that depends on the direction alone, with `cells` values per turn."""
    knots = np.linspace(0, 2 * np.pi, cells, endpoint=False)
    return np.interp(angle, knots, rng.uniform(-1, 1, cells), period=2 * np.pi)


def cloud(rng: np.random.Generator, feature: float) -> np.ndarray:
    """Smooth noise over the fine grid, roughly in -1..1, with features of `feature` pixels."""
    cells = int(np.ceil(SIZE / feature))
    side = SIZE * SUPERSAMPLE
    coarse = rng.uniform(-1, 1, (cells, cells))
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def draw_body(rng: np.random.Generator, pose: Pose) -> np.ndarray:
    """The table (over-exposed white) and the body's shoulder, out of focus. (H, W, 3)"""
    radius, angle = polar(pose.centre, pose.scale)
    level = np.interp(radius, *np.transpose(BODY_PROFILE))
    level *= 1 + 0.16 * np.cos(angle - pose.light)
    for at, width, direction, spread, strength in BODY_REFLECTIONS:
        level += strength * arc(radius, angle, at, width, pose.light + direction, spread)
    level += 0.05 * ring(radius, 97, 1.2) * around(rng, angle - pose.spin, 9)
    warmth = 0.10 * arc(radius, angle, 93, 2.0, pose.light + 2.4, 0.8)
    glass = level[..., None] * GLASS + warmth[..., None] * AMBER
    table = 1.07 - 0.05 * step(radius, 120, 180)  # slight vignette
    outside = step(radius, BODY_RADIUS - 1.5, BODY_RADIUS + 3.0)
    return glass * (1 - outside)[..., None] + (table * outside)[..., None]


def draw_mouth(rng: np.random.Generator, pose: Pose) -> np.ndarray:
    """The mouth: hole with the bottom's rings, grainy neck, glossy lip, amber rim. (H, W, 3)"""
    radius, angle = polar(pose.mouth, pose.scale)
    turned = angle - pose.spin
    towards_lamp = np.cos(angle - pose.light)
    level = np.interp(radius, *np.transpose(MOUTH_PROFILE)) * (1 + 0.10 * towards_lamp)

    # The neck's inner wall is rough: fine grain, lit from the far side.
    grain = 0.7 * cloud(rng, 1.5) + 0.3 * around(rng, turned, 300)
    wall = step(radius, 56, 58) * (1 - step(radius, 68, 71))
    level += wall * (0.055 * grain + 0.06 * np.exp((-towards_lamp - 1) / 0.9**2))

    # The lip is polished: concentric reflections whose ends fade.
    wavy = radius + 0.35 * around(rng, turned, 14)
    for at, width, direction, spread, strength in LIP_REFLECTIONS:
        level += strength * arc(wavy, angle, at, width, pose.light + direction, spread)

    # The bottom, seen through the hole, shifts against the mouth: moulded rings, and a dim glow.
    bottom, _ = polar(pose.mouth + 2 * (pose.mouth - pose.centre), pose.scale)
    rings = 0.035 * ring(bottom, 0, 14) + 0.030 * ring(bottom, 5, 1.2)
    rings += 0.030 * ring(bottom, 25, 1.6) + 0.022 * ring(bottom, 36, 1.3)
    level += rings * (1 - step(bottom, 40, 48))

    # Light from below through the rim: a streaky amber ring, and a thin one at the neck's edge.
    drift = radius + 0.9 * around(rng, turned, 16)
    streaks = 0.62 + 0.25 * around(rng, turned, 90) + 0.22 * around(rng, turned, 11)
    amber = ring(drift, AMBER_RADIUS, 1.3) * streaks * (0.75 + 0.25 * towards_lamp)
    amber += 0.35 * ring(radius, HOLE_RADIUS - 0.6, 0.7)

    glints = np.zeros_like(radius)
    for at, width, direction, spread, strength in GLINTS:
        towards = pose.light + direction + rng.uniform(-0.06, 0.06)
        glints += strength * arc(drift, angle, at, width, towards, spread)
    amber, glints = np.clip(amber, 0, 1)[..., None] * AMBER, glints[..., None] * WARM_WHITE
    return level[..., None] * GLASS + amber + glints


def draw_bottle(rng: np.random.Generator, pose: Pose) -> np.ndarray:
    """A flawless bottle on the fine grid, (H, W, 3)."""
    body, mouth = draw_body(rng, pose), draw_mouth(rng, pose)
    radius, _ = polar(pose.mouth, pose.scale)
    seam = step(radius, MOUTH_RADIUS - 0.7, MOUTH_RADIUS + 0.7)[..., None]
    return (mouth * (1 - seam) + body * seam) * pose.strength


def unit(angle: np.ndarray | float) -> np.ndarray:
    """Unit vectors (..., 2), as (x, y), in these directions."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def to_picture(pose: Pose, radius: np.ndarray | float, angle: np.ndarray | float) -> np.ndarray:
    """Picture coordinates (n, 2) of points given in the mouth's polar coordinates."""
    return pose.mouth + pose.scale * np.asarray(radius)[..., None] * unit(angle)


def fixed_point(points: np.ndarray) -> np.ndarray:
    """Picture coordinates as OpenCV wants them: on the fine grid, in 1/16ths, (1, n, 2) int32."""
    return np.rint(((points + 0.5) * SUPERSAMPLE - 0.5) * 16).astype(np.int32)[None]


def polygon(points: np.ndarray) -> np.ndarray:
    """Fine-grid mask (bool) of the polygon with these corners (n, 2)."""
    mask = np.zeros((SIZE * SUPERSAMPLE,) * 2, np.uint8)
    return cv2.fillPoly(mask, fixed_point(points), 1, cv2.LINE_8, 4).astype(bool)


def blob(rng: np.random.Generator, centre: np.ndarray, size: float, corners: int) -> np.ndarray:
    """Fine-grid mask of an irregular lump about `size` pixels in radius."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    rough = 0.25 * around(rng, angle, 5) + 0.12 * around(rng, angle, 11)
    reach = size * (1 + rough + 0.03 * rng.uniform(-1, 1, corners))
    flattened = unit(angle) * (1, rng.uniform(0.65, 1))
    return polygon(centre + reach[:, None] * flattened)


def edge_of(mask: np.ndarray, width: int) -> np.ndarray:
    """The part of a fine-grid mask within `width` pixels of its outline, fading inwards, 0..1."""
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return mask * np.clip(1 - depth.astype(np.float64) / (width * SUPERSAMPLE), 0, 1)


def creases(rng: np.random.Generator, spacing: float) -> np.ndarray:
    """Fine curved lines about `spacing` pixels apart, 0..1, each bright for part of its length."""
    lines = np.exp(-np.abs(cloud(rng, spacing)) * spacing / 1.2)
    return lines * np.clip(0.3 + cloud(rng, spacing), 0, 1)


def fracture(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Broken glass: `count` tilted facets, mostly dark, with the lamp caught in a few. (H, W, 3)

    A facet is what lies nearest to one seed, stretched along the break's own grain into a shard
    (a Voronoi cell with soft borders); its brightness is a plane, as of a flat tilted surface.
    """
    x, y = fine_grid()
    x, y = x + 2.0 * cloud(rng, 9), y + 2.0 * cloud(rng, 9)  # no facet's border is quite straight
    places = np.argwhere(mask)
    seeds = (places[rng.choice(len(places), count)] + 0.5) / SUPERSAMPLE - 0.5  # (count, [y, x])
    spot_y, spot_x = seeds[0]  # the lamp is seen in the shards around the first one
    grain = rng.uniform(0, np.pi)
    level, lamp, total = np.zeros((3, *mask.shape))
    for seed_y, seed_x in seeds:
        direction, stretch = grain + rng.normal(0, 0.5), rng.uniform(1.5, 4.0)
        along = np.cos(direction) * (x - seed_x) + np.sin(direction) * (y - seed_y)
        aside = np.cos(direction) * (y - seed_y) - np.sin(direction) * (x - seed_x)
        weight = np.exp(-np.hypot(along / stretch, aside) / 0.45)
        bright = rng.random() < 0.25
        base, slope = (0.34, 0.05) if bright else (rng.uniform(0.04, 0.10), 0.006)
        shine = np.exp(-np.hypot(seed_x - spot_x, seed_y - spot_y) / 6) * rng.uniform(0.6, 1.1)
        level += weight * np.clip(base + rng.choice([-slope, slope]) * aside, 0.03, 0.55)
        lamp += weight * shine
        total += weight
    level = level / total * (1 + 0.25 * cloud(rng, 8) + 0.12 * cloud(rng, 2))
    sparkle = lamp / total * np.clip(0.4 + 1.2 * cloud(rng, 3.5), 0, 1.1)
    picture = (np.clip(level, 0.03, 0.6) + 0.22 * creases(rng, 9))[..., None] * GLASS
    return picture + sparkle[..., None] * WARM_WHITE


def draw_chip(
    rng: np.random.Generator,
    pose: Pose,
    middle: float,
    span: float,
    inner: tuple[float, float],
    outer: tuple[float, float],
) -> Defect:
    """Glass broken out of the lip around direction `middle`, `span` radians wide.

    Its jagged outline wanders between the radii of `inner` towards the hole, of `outer` away.
    """
    corners = max(4, round(span * 80 / 8))
    across = np.linspace(-0.5, 0.5, corners) + rng.uniform(-0.3, 0.3, corners) / corners
    bow = np.sqrt(np.clip(1.1 - 4 * across**2, 0, 1))  # the break is shallow at its two ends
    far = outer[0] + (outer[1] - outer[0]) * (0.5 * bow + 0.5 * rng.uniform(0, 1, corners))
    near = inner[0] + (inner[1] - inner[0]) * (0.7 * (1 - bow) + 0.3 * rng.uniform(0, 1, corners))
    angle = middle + span * np.concatenate([across, 0.85 * across[::-1]])
    mask = polygon(to_picture(pose, np.concatenate([far, near[::-1]]), angle))

    area = mask.sum() / SUPERSAMPLE**2
    colour = fracture(rng, mask, count=int(np.clip(area / 60, 4, 40)))
    radius, _ = polar(pose.mouth, pose.scale)
    colour *= (0.45 + 0.55 * step(radius, inner[0], inner[0] + 16))[..., None]  # falls to the hole
    rim = edge_of(mask, 1) * np.clip(0.35 + 0.8 * cloud(rng, 6), 0, 1)
    colour += (0.35 * rim)[..., None] * (AMBER + WARM_WHITE) / 1.5
    return mask, colour


def draw_broken_large(rng: np.random.Generator, pose: Pose) -> list[Defect]:
    """A large part of the lip is missing: a sixth to over a third of the way around."""
    span = rng.uniform(1.1, 2.3)
    return [draw_chip(rng, pose, rng.uniform(-np.pi, np.pi), span, (50, 58), (78, 100))]


def draw_broken_small(rng: np.random.Generator, pose: Pose) -> list[Defect]:
    """One small chip in the lip, often with a splinter beside it."""
    middle, span = rng.uniform(-np.pi, np.pi), rng.uniform(0.22, 0.42)
    inner = rng.uniform(54, 68)
    chips = [draw_chip(rng, pose, middle, span, (inner, inner + 14), (84, 92))]
    if rng.random() < 0.5:
        beside = middle + rng.choice([-1, 1]) * (span / 2 + rng.uniform(0.12, 0.25))
        chips.append(draw_chip(rng, pose, beside, 0.12, (68, 71), (77, 83)))
    return chips


def draw_film(rng: np.random.Generator, pose: Pose) -> list[Defect]:
    """A scrap of whitish film lying in the bottle: translucent, creased, with a brighter edge."""
    reach, angle = rng.uniform(6, 20), rng.uniform(-np.pi, np.pi)
    mask = blob(rng, to_picture(pose, reach, angle), rng.uniform(18, 27), 44)
    tint = np.array([0.80, 0.92, 1.0]) * rng.uniform(0.9, 1.1)
    level = 0.27 + 0.11 * cloud(rng, 16) + 0.03 * cloud(rng, 2)
    level += 0.30 * creases(rng, 16) + 0.22 * edge_of(mask, 3) * np.clip(0.6 + cloud(rng, 9), 0, 1)
    return [(mask, np.clip(level, 0.16, 1)[..., None] * tint)]


def draw_flecks(rng: np.random.Generator, pose: Pose) -> list[Defect]:
    """Crumbs of brown and grey dirt on the bottom and on the neck's wall."""
    middle = rng.uniform(-np.pi, np.pi)
    flecks = []
    for size in [*rng.uniform(2.5, 4.5, rng.integers(4, 8)), rng.uniform(6, 9)]:
        place = to_picture(pose, rng.uniform(15, 60), middle + rng.normal(0, 0.5))
        mask = blob(rng, place, size, 11)
        tint = np.array([0.45, 0.62, 0.85]) if rng.random() < 0.6 else np.array([0.75, 0.8, 0.8])
        level = 0.42 + 0.14 * cloud(rng, 4) + 0.10 * cloud(rng, 1.5) - 0.12 * edge_of(mask, 2)
        flecks.append((mask, np.clip(level, 0.2, 1)[..., None] * tint))
    return flecks


def draw_fibre(rng: np.random.Generator, pose: Pose) -> list[Defect]:
    """Lint: two curled threads, 3 pixels thick, lying near each other."""
    middle = to_picture(pose, rng.uniform(0, 15), rng.uniform(-np.pi, np.pi))
    threads = []
    for length in rng.uniform(60, 85), rng.uniform(30, 50):
        along = np.linspace(-1, 1, 80)
        bend, curl = rng.uniform(0.6, 1.5) * rng.choice([-1, 1]), rng.uniform(3, 5)
        heading = rng.uniform(-np.pi, np.pi) + bend * along + 0.6 * np.sin(curl * along)
        path = np.cumsum(unit(heading), axis=0)
        path = (path - path.mean(axis=0)) * length / len(path) + middle + rng.normal(0, 6, 2)
        drawn = np.zeros((SIZE * SUPERSAMPLE,) * 2, np.uint8)
        cv2.polylines(drawn, fixed_point(path), False, 1, 3 * SUPERSAMPLE, cv2.LINE_8, 4)
        mask = drawn.astype(bool)
        level = 0.52 + 0.16 * cloud(rng, 9) + 0.05 * cloud(rng, 1.5) - 0.22 * edge_of(mask, 1)
        threads.append((mask, np.clip(level, 0.2, 1)[..., None] * np.array([0.88, 0.95, 1.0])))
    return threads


DEFECTS = {
    "broken_large": (draw_broken_large,),
    "broken_small": (draw_broken_small,),
    "contamination": (draw_film, draw_flecks, draw_fibre),  # taken in turn
}


def to_pixels(scene: np.ndarray) -> np.ndarray:
    """What the lens makes of a fine-grid scene, before noise: blurred, averaged to pixels."""
    side = 2 * (BLUR_RADIUS - 1) * SUPERSAMPLE + 1  # of the kernel: it reaches less than the radius
    blurred = cv2.GaussianBlur(scene, (side, side), BLUR_SIGMA * SUPERSAMPLE)
    return cv2.resize(blurred, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def photograph(rng: np.random.Generator, exact: np.ndarray) -> np.ndarray:
    """A noisy 8-bit picture: shot noise grows with the light, read noise does not."""
    sigma = np.sqrt(0.0035**2 + 0.009**2 * np.clip(exact, 0, 1))
    noisy = exact + sigma * rng.standard_normal(exact.shape)
    return np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def draw_sample(seed: int, split: str, index: int) -> Sample:
    """Picture `index` of `split` (a name in SPLITS such as "test/broken_small")."""
    sequence = np.random.SeedSequence([seed, SPLITS.index(split), index])
    for_pose, for_scene, for_defect, for_noise = map(np.random.default_rng, sequence.spawn(4))
    pose = draw_pose(for_pose)
    scene = draw_bottle(for_scene, pose)
    flawless = to_pixels(scene)
    covered = np.zeros(scene.shape[:2])
    variants = DEFECTS.get(Path(split).name)
    if variants:
        for mask, colour in variants[index % len(variants)](for_defect, pose):
            scene = np.where(mask[..., None], colour * pose.strength, scene)
            covered[mask] = 1
    damaged = to_pixels(scene)
    mask = cv2.resize(covered, (SIZE, SIZE), interpolation=cv2.INTER_AREA) >= 0.5
    return Sample(photograph(for_noise, damaged), mask.astype(np.uint8) * 255, flawless, damaged)


def draw_all(seed: int, output: Path, images: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Every file's path and its pixels: the data set under `output`, the examples in `images`."""
    for split, count in COUNTS.items():
        for index in range(count):
            sample = draw_sample(seed, split, index)
            yield output / "bottle" / split / f"{index:03d}.png", sample.picture
            if sample.mask.any():
                truth = output / "bottle" / "ground_truth" / Path(split).name
                yield truth / f"{index:03d}_mask.png", sample.mask
    for name, split in EXAMPLES.items():
        yield images / name, draw_sample(seed, split, 0).picture


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a picture whole, with settings that do not change.

    Raises:
        UserError: it cannot be written.
    """
    _, encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    write_whole(path, lambda name: Path(name).write_bytes(encoded.tobytes()))


def main() -> None:
    parser = ArgumentParser(prog="datasets.lite_data", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("lite_data"), help="the data set (%(default)s)")
    parser.add_argument("--images", type=Path, default=Path("images"), help="two example pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (%(default)s)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must not be negative")
    written = 0
    for path, pixels in draw_all(args.seed, args.output, args.images):
        write_png(path, pixels)
        written += 1
    print(f"{written} files written to {args.output} and {args.images}")


if __name__ == "__main__":
    run_main(main)
