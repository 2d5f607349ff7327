"""Pictures in the layout of MVTec AD: any folder of this form is a category.

{data}/{category}/train/good/*                 good pictures to learn from
{data}/{category}/test/good/*                  good pictures to test on
{data}/{category}/test/{defect}/*              pictures with a defect
{data}/{category}/ground_truth/{defect}/*      their masks, `{picture name}_mask.png`; may be missing as a whole

The whole test folder may be missing too: nothing can be measured then.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.common.cli import UserError, warn
from deploy.common.imaging import is_image, list_images, read_mask, read_rgb, resize

# The order in which the published tables list the categories.
MVTEC_CATEGORIES = [
    "toothbrush",
    "screw",
    "hazelnut",
    "transistor",
    "tile",
    "pill",
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "leather",
    "metal_nut",
    "wood",
    "zipper",
]
READERS = 4  # threads that decode pictures ahead of their use


@dataclass(frozen=True)
class LabelledImage:
    """A picture of the test set."""

    path: Path
    defect: str | None  # name of its defect's folder, None for a good picture
    mask: Path | None  # None for good pictures and for defects without masks


@dataclass(frozen=True)
class Category:
    """The pictures of one category, sorted by folder and name; `test` is empty if there is no test folder."""

    name: str
    train: list[Path]
    test: list[LabelledImage]


@dataclass(frozen=True)
class GroundTruth:
    """What the test pictures are.

    labels: (N,) bool, whether the picture has a defect.
    masks: (N, H, W) bool, which pixels belong to it; None if some defect picture has no mask, or without pictures.
    """

    labels: np.ndarray
    masks: np.ndarray | None


def list_categories(data: Path) -> list[str]:
    """Categories under the data folder: MVTec's in the published order, then any other folder by name.

    Raises:
        UserError: no such folder, or no category in it.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    parts = ("test", "train/good")
    found = sorted(folder.name for folder in data.iterdir() if any((folder / part).is_dir() for part in parts))
    if not found:
        raise UserError(f"--data {data}: no category in it (a folder with train/good and test, see README.md)")
    return [name for name in MVTEC_CATEGORIES if name in found] + [n for n in found if n not in MVTEC_CATEGORIES]


def load_category(data: Path, name: str) -> Category:
    """Find the pictures of a category; none is opened yet.

    Raises:
        UserError: no such category, no pictures, or a mask is missing among others of its defect.
    """
    folder = data / name
    if name in ("", "..") or Path(name).name != name or not folder.is_dir():
        known = f"; there are: {', '.join(list_categories(data))}" if data.is_dir() else ""
        raise UserError(f"category {name}: no such folder under --data {data}{known}")
    train = list_images(_existing(folder / "train" / "good"))
    if not (folder / "test").exists():
        return Category(name, train, [])
    test: list[LabelledImage] = []
    for defect_folder in sorted(
        path for path in _existing(folder / "test").iterdir() if path.is_dir() and not path.name.startswith(".")
    ):
        defect = None if defect_folder.name == "good" else defect_folder.name
        masks = _masks(folder / "ground_truth" / defect) if defect else {}
        for path in list_images(defect_folder):
            mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
            if masks and mask is None:
                wanted = folder / "ground_truth" / defect / f"{path.stem}_mask.png"
                raise UserError(f"{path}: its mask {wanted} is missing (only a defect without any mask may lack them)")
            test.append(LabelledImage(path, defect, mask))
    if not test:
        raise UserError(f"{folder / 'test'}: no folder with test pictures in it (good, or the name of a defect)")
    return Category(name, train, test)


def hold_out(train: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Split good training pictures at random into those to learn from and those that training never sees.

    Args:
        train: the pictures.
        share: in [0, 1), of the pictures to keep out, rounded, but at least one unless it is 0.
        seed: the same pictures, share and seed give the same split.

    Raises:
        UserError: no picture would be left to learn from.
    """
    count = max(1, round(share * len(train))) if share else 0
    if count >= len(train):
        raise UserError(f"holdout: {share:g} of {len(train)} good pictures leaves none to learn from; add pictures")
    chosen = set(np.random.default_rng(seed).permutation(len(train))[:count])
    return [p for i, p in enumerate(train) if i not in chosen], [train[i] for i in sorted(chosen)]


def load_ground_truth(test: Sequence[LabelledImage], size: tuple[int, int], rule: str) -> GroundTruth:
    """Read the masks and turn them into labels per pixel and per picture.

    Args:
        test: the test pictures.
        size: height and width of the anomaly map in pixels.
        rule: `published`: the mask is resized bilinearly, divided by 255 and truncated, so only pixels that are
            still exactly 255 count; a picture is anomalous if any pixel is. `half`: pixels of 128 and more count,
            and a picture is anomalous if it lies in a defect's folder.

    Raises:
        UserError: a mask cannot be read.
    """
    from_folder = np.array([image.defect is not None for image in test], dtype=bool)
    if not test or any(image.defect and image.mask is None for image in test):
        return GroundTruth(from_folder, None)
    lowest = 255 if rule == "published" else 128
    masks = np.zeros((len(test), *size), dtype=bool)
    for i, image in enumerate(test):
        if image.mask is not None:
            masks[i] = resize(read_mask(image.mask), *size) >= lowest
            if not masks[i].any():
                good = (
                    ": its picture counts as a good one; for masks that are not 0 and 255, or of tiny defects, give "
                    "-o mask_rule=half"
                )
                warn(
                    f"{image.mask}: no pixel is left of this mask under mask_rule: {rule}"
                    + (good if rule == "published" else "")
                )
    labels = masks.any(axis=(1, 2)) if rule == "published" else from_folder
    return GroundTruth(labels, masks)


def read_batches(paths: Sequence[Path], batch_size: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Pictures (B, H, W, 3) uint8 RGB in the order of `paths`, resized to `size` = (H, W); the last batch may be short.

    Raises:
        UserError: a picture cannot be read.
    """

    def read(path: Path) -> np.ndarray:
        return resize(read_rgb(path), *size)

    with ThreadPoolExecutor(READERS) as pool:
        pending = [pool.submit(read, path) for path in paths[: 2 * batch_size]]
        for start in range(0, len(paths), batch_size):
            ahead = paths[start + 2 * batch_size : start + 3 * batch_size]
            batch = [future.result() for future in pending[:batch_size]]
            pending = pending[batch_size:] + [pool.submit(read, path) for path in ahead]
            yield np.stack(batch)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a category needs train/good and test (see README.md)")
    return folder


def _masks(folder: Path) -> dict[str, Path]:
    """Masks of one defect by file name without suffix."""
    return {path.stem: path for path in sorted(folder.iterdir()) if is_image(path)} if folder.is_dir() else {}
