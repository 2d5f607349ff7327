"""Pictures in the layout of MVTec AD: any folder of this form is a category.

{data}/{category}/train/good/*                 good pictures to learn from
{data}/{category}/test/good/*                  good pictures to test on
{data}/{category}/test/{defect}/*              pictures with a defect
{data}/{category}/ground_truth/{defect}/*      their masks, `{picture name}_mask.png`; may be missing as a whole

The whole test folder may be missing too: nothing can be measured then. `datasets.layout` says what else is understood.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets import layout
from deploy.common.cli import UserError, warn
from deploy.common.imaging import read_mask, read_rgb, resize

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
LARGEST_INDEX = 3  # masks without a higher value number their defects; nobody could see them as grey
READERS = 4  # threads that decode pictures ahead of their use


@dataclass(frozen=True)
class LabelledImage:
    """A picture of the test set; good pictures, and defects without masks, have none."""

    path: Path
    defect: str | None  # name of its defect's folder, None for a good picture
    masks: tuple[Path, ...] = ()  # together they are its mask


@dataclass(frozen=True)
class Category:
    """The pictures of one category, sorted by folder and name; `test` is empty if there is no test folder."""

    name: str
    train: list[Path]
    test: list[LabelledImage]
    good_folders: list[layout.Folder]  # those with the pictures of `train`
    test_folders: list[layout.Folder]
    ground_truth: Path | None  # the folder with the masks

    @property
    def folder(self) -> Path:
        """Of the category."""
        return self.good_folders[0].path.parent.parent

    def name_of(self, picture: Path) -> str:
        """What a picture of `train` is called in checkpoints: its path from the folder of good pictures on."""
        first = self.good_folders[0].path
        return picture.relative_to(first if len(self.good_folders) == 1 else first.parent).as_posix()

    def digest_of(self, pictures: Sequence[Path]) -> str:
        """SHA-256 of the sorted names of pictures of `train`, a line each: the same where the same files were taken."""
        names = "".join(f"{name}\n" for name in sorted(map(self.name_of, pictures)))
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


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
    folders = layout.subfolders(data)
    found = [folder.name for folder in folders if _parts(folder) != (None, None)]
    if not found:
        advice = ""
        deeper = [folder for folder in folders if any(_parts(below)[0] for below in layout.subfolders(folder))]
        if deeper:
            advice = f"; there are some in {deeper[0].name}: give --data {deeper[0]}"
        if layout.find(data, layout.TRAIN):
            advice = f"; it is a category itself: give --data {data.resolve().parent} -cat {data.resolve().name}"
        raise UserError(f"--data {data}: no category in it (a folder with train/good and test, see README.md){advice}")
    return [name for name in MVTEC_CATEGORIES if name in found] + [n for n in found if n not in MVTEC_CATEGORIES]


def load_category(data: Path, name: str) -> Category:
    """Find the pictures of a category; none is opened yet.

    Raises:
        UserError: no such category, no pictures, or a mask is missing among others of its defect.
    """
    folder = data / name
    if name in ("", "..") or Path(name).name != name or not folder.is_dir():
        known = ", ".join(list_categories(data))
        raise UserError(f"category {name}: no such folder under --data {data}; there are: {known}")
    train, test = _parts(folder)
    if not train:
        there = ", ".join(path.name for path in layout.subfolders(folder)) or "no folder"
        raise UserError(
            f"{folder / 'train'}: no such folder; a category needs train/good (see README.md), it has: {there}"
        )
    good = layout.good_folders(train)
    folders = layout.test_folders(test) if test else []
    ground_truth = layout.find(folder, layout.MASKS) or (test and layout.find(test, layout.MASKS))
    masks = layout.match_masks(ground_truth, [f for f in folders if f.defect]) if ground_truth else {}
    for defect in folders:
        lacking = [path for path in defect.pictures if path not in masks]
        if 0 < len(lacking) < len(defect.pictures):
            wanted = ground_truth / defect.path.name / f"{lacking[0].stem}_mask.png"
            more = f"; so are those of {len(lacking) - 1} more" if lacking[1:] else ""
            raise UserError(
                f"{lacking[0]}: its mask {wanted} is missing{more} (only a defect without any mask may lack them)"
            )
    pictures = [LabelledImage(path, f.defect, masks.get(path, ())) for f in folders for path in f.pictures]
    return Category(name, [path for f in good for path in f.pictures], pictures, good, folders, ground_truth)


def _parts(category: Path) -> tuple[Path | None, Path | None]:
    """The folders of training and of test pictures."""
    return layout.find(category, layout.TRAIN), layout.find(category, layout.TEST)


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
            and a picture is anomalous if it lies in a defect's folder. `nonzero`: as `half`, of a mask that was made
            255 wherever it is above 0; where no mask has a value above 3, this is what is done under any rule.

    Raises:
        UserError: a mask cannot be read.
    """
    from_folder = np.array([image.defect is not None for image in test], dtype=bool)
    if not test or any(image.defect and not image.masks for image in test):
        return GroundTruth(from_folder, None)
    lowest = 255 if rule == "published" else 128
    masks = np.zeros((len(test), *size), dtype=bool)
    highest, empty = 0, []
    for i, image in enumerate(test):
        if image.masks:
            mask = np.maximum.reduce([read_mask(path) for path in image.masks])
            highest = max(highest, int(mask.max()))
            masks[i] = resize(np.uint8(255 * (mask > 0)) if rule == "nonzero" else mask, *size) >= lowest
            if not masks[i].any():
                empty.append(image.masks[0])
    if 0 < highest <= LARGEST_INDEX and rule != "nonzero":
        folder = next(image.masks[0].parent for image in test if image.masks)
        warn(f"{folder}: no mask has a value above {highest}; the defect is where it is above 0 (mask_rule: nonzero)")
        return load_ground_truth(test, size, "nonzero")
    if empty:
        more = f" and {len(empty) - 1} more" if empty[1:] else ""
        good = ", and their pictures count as good ones" if rule == "published" else ""
        advice = "; for masks that are not 0 and 255, or of tiny defects, give -o mask_rule=nonzero"
        warn(
            f"{empty[0]}{more}: no pixel of the mask is left under mask_rule: {rule}{good}"
            + (advice if rule != "nonzero" else "")
        )
    labels = masks.any(axis=(1, 2)) if rule == "published" else from_folder
    return GroundTruth(labels, masks)


def read_batches(
    paths: Sequence[Path],
    batch_size: int,
    size: tuple[int, int],
    read: Callable[[Path], np.ndarray] = read_rgb,
) -> Iterator[np.ndarray]:
    """Pictures (B, H, W, 3) uint8 RGB in the order of `paths`, resized to `size` = (H, W); the last batch may be short.

    `read` gives a picture of any size, (h, w, 3) uint8 RGB.

    Raises:
        UserError: a picture cannot be read.
    """

    def read_resized(path: Path) -> np.ndarray:
        return resize(read(path), *size)

    with ThreadPoolExecutor(READERS) as pool:
        pending = [pool.submit(read_resized, path) for path in paths[: 2 * batch_size]]
        for start in range(0, len(paths), batch_size):
            ahead = paths[start + 2 * batch_size : start + 3 * batch_size]
            batch = [future.result() for future in pending[:batch_size]]
            pending = pending[batch_size:] + [pool.submit(read_resized, path) for path in ahead]
            yield np.stack(batch)
