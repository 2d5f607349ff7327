"""Inputs that every contender computes from the same seeds, and a data set of bottle's size. No framework here."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from datasets.mvtec import GroundTruth
from deploy.common.files import make_folder

TRAIN, TEST = 209, 83  # pictures of MVTec's bottle
GOOD = 20  # good ones among the test pictures
SIDE = 900  # pixels, of a picture of bottle
ROOT = Path(__file__).resolve().parent.parent
LITE_BOTTLE = ROOT / "lite_data/bottle"
Item = TypeVar("Item")


def random_images(batch: int, size: int) -> np.ndarray:
    """(batch, 3, size, size) float32 in the range of normalised pictures."""
    return np.random.RandomState(batch).rand(batch, 3, size, size).astype(np.float32) * 4 - 2


def random_maps(count: int, size: int = 256) -> tuple[np.ndarray, GroundTruth]:
    """Anomaly maps (count, size, size) float32 in [0, 1) and their truth: discs that score a little higher.

    A quarter of the pictures is good. The scores are spread out without ties, as a model's are.
    """
    random = np.random.RandomState(count)
    maps = 0.7 * random.rand(count, size, size).astype(np.float32)
    masks = np.zeros((count, size, size), bool)
    rows, columns = np.mgrid[:size, :size]
    for i in range(count // 4, count):
        row, column, radius = random.randint(size), random.randint(size), random.randint(size // 16, size // 5)
        masks[i] = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
    maps[masks] += np.float32(0.25)
    return maps, GroundTruth(masks.any(axis=(1, 2)), masks)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spaced, so that each of their kinds is among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def write_bottle(folder: Path, train: int = TRAIN, test: int = TEST) -> None:
    """Write a category of bottle's picture counts and sizes: the pictures of lite_data enlarged, with noise.

    The noise makes the pictures differ, and their PNG files as slow to decode as photographs.
    """
    random = np.random.RandomState(0)
    good = round(test * GOOD / TEST)
    drawn = sorted(path for path in (LITE_BOTTLE / "test").glob("*/*.png") if path.parent.name != "good")
    sources = [("train/good", path) for path in _cycle(sorted((LITE_BOTTLE / "train/good").glob("*.png")), train)]
    sources += [("test/good", path) for path in _cycle(sorted((LITE_BOTTLE / "test/good").glob("*.png")), good)]
    sources += [(f"test/{path.parent.name}", path) for path in _cycle(drawn, test - good)]
    for i, (split, source) in enumerate(sources):
        target = make_folder(folder / split) / f"{i:03d}.png"
        picture = cv2.resize(cv2.imread(str(source)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        noise = random.randint(-4, 5, picture.shape, np.int8)
        cv2.imwrite(
            str(target), cv2.add(picture.astype(np.int16), noise.astype(np.int16)).clip(0, 255).astype(np.uint8)
        )
        mask = LITE_BOTTLE / "ground_truth" / source.parent.name / f"{source.stem}_mask.png"
        if split != "train/good" and mask.exists():
            truth = make_folder(folder / "ground_truth" / source.parent.name) / f"{i:03d}_mask.png"
            shutil.copy(mask, truth)


def _cycle(items: list[Path], count: int) -> list[Path]:
    return [items[i % len(items)] for i in range(count)]
