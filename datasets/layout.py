"""Which folder of a category holds what: MVTec AD's layout, and what people make of it.

Names of folders count in any case and with any separators: `Ground Truth` is `ground_truth`, `test/OK` is `test/good`.
Pictures may lie in subfolders. Nothing is opened here.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.common.cli import UserError
from deploy.common.imaging import SUFFIXES, is_image

TRAIN = ("train",)
TEST = ("test", "testpublic")  # the second is MVTec AD 2's
MASKS = ("groundtruth", "gt", "masks", "mask")
GOOD = (
    "good ok okay normal pass passed fine perfect sound intact healthy clean golden free defectfree nodefect nodefects "
    "nondefective faultfree anomalyfree noanomaly 正常 良品 合格 合格品 好 好品"
).split()
MASK_ENDING = re.compile(r"([\W_]*masks?|[\W_]+(gt|labels?|seg))$")  # of a mask's name, after the picture's


@dataclass(frozen=True)
class Folder:
    """A folder of pictures; `defect` is its name, None for good ones. Pictures and other files are sorted."""

    path: Path
    defect: str | None
    pictures: list[Path]
    others: list[Path]


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The subfolder of one of these names, the first of them that there is."""
    found = {plain(path.name): path for path in reversed(subfolders(folder))}
    return next((found[name] for name in names if name in found), None)


def plain(name: str) -> str:
    """A name in lower case without separators."""
    return re.sub(r"[\W_]+", "", name.casefold())


def is_good(name: str) -> bool:
    """Whether a folder of this name holds good pictures."""
    return plain(name) in GOOD


def looks_good(name: str) -> bool:
    """Whether a name has a word for good in it, though it is not one: `good_2`, `not ok`."""
    return any(word in GOOD or word.removesuffix("s") in GOOD for word in re.split(r"[\W\d_]+", name.casefold()))


def subfolders(folder: Path) -> list[Path]:
    """Sorted; hidden ones are left out.

    Raises:
        UserError: the folder cannot be looked at.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be looked at ({error.strerror})") from error


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures and other files of a folder and its subfolders, sorted; hidden ones are left out, links followed once.

    Raises:
        UserError: a folder cannot be looked at.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be looked at ({error.strerror})") from error

    pictures, others, seen = [], [], set()
    for top, below, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(top)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(top, name) for name in names if not name.startswith(".")):
            (pictures if is_image(path) else others).append(path)
    return sorted(pictures), sorted(others)


def read_folder(path: Path, defect: str | None) -> Folder:
    """The folder with what lies in it.

    Raises:
        UserError: no picture does.
    """
    pictures, others = files_below(path)
    if not pictures:
        beside = f", but {others[0].name} and such" if others else ""
        raise UserError(f"{path}: no picture in this folder ({' '.join(SUFFIXES)}){beside}")
    return Folder(path, defect, pictures, others)


def masks_among(folder: Folder) -> list[Path]:
    """Pictures that by their name are masks of others beside them, such as `0_mask.png` of `0.png`."""
    names = {_key(path.with_suffix("")) for path in folder.pictures}
    return [
        path
        for path in folder.pictures
        if (shorter := MASK_ENDING.sub("", key := _key(path.with_suffix("")))) != key and shorter in names
    ]


def good_folders(train: Path) -> list[Folder]:
    """Folders of good pictures to learn from.

    Raises:
        UserError: there is none; the message says which folder to rename, if one could be it.
    """
    good = [path for path in subfolders(train) if is_good(path.name)]
    if good:
        return [read_folder(path, None) for path in good]
    there = [f"{path.name} ({count})" for path in subfolders(train) if (count := len(files_below(path)[0]))]
    direct = sum(is_image(path) for path in train.iterdir())
    if there:
        advice = f"there are pictures in {', '.join(there)}: rename the one with the good pictures to good"
    elif direct:
        advice = f"{direct} pictures lie in train itself: if all are good, move them into good"
    else:
        advice = "put the good pictures to learn from there"
    raise UserError(f"{train / 'good'}: no such folder; {advice}")


def test_folders(test: Path) -> list[Folder]:
    """Folders of test pictures, good ones and those of each defect.

    Raises:
        UserError: there is none, or one is empty.
    """
    folders = [path for path in subfolders(test) if plain(path.name) not in MASKS]
    if not folders:
        direct = sum(is_image(path) for path in test.iterdir())
        advice = f": sort its {direct} pictures into such folders" if direct else ""
        raise UserError(f"{test}: no folder with test pictures in it (good, or the name of a defect){advice}")
    return [read_folder(path, None if is_good(path.name) else path.name) for path in folders]


def match_masks(ground_truth: Path, folders: Iterable[Folder]) -> dict[Path, tuple[Path, ...]]:
    """The masks of each defect picture that has any; where a picture has several, together they are its mask.

    They lie in a subfolder named as the defect, else in `ground_truth` itself, under the picture's name with
    `_mask` or another `MASK_ENDING` behind it or not, or in a folder of that name, as in MVTec LOCO.

    Raises:
        UserError: one mask would be that of two pictures.
    """
    direct = [path for path in sorted(ground_truth.iterdir()) if is_image(path)]
    found: dict[Path, tuple[Path, ...]] = {}
    owners: dict[Path, Path] = {}
    for folder in folders:
        own = find(ground_truth, [plain(folder.path.name)])
        masks = _by_picture_name(own or ground_truth, files_below(own)[0] if own else direct)
        for picture in folder.pictures:
            place = picture.relative_to(folder.path).with_suffix("")
            mine = masks.get(_key(place)) or masks.get(_key(Path(place.name)), ())
            for mask in mine:
                if owners.setdefault(mask, picture) != picture:
                    raise UserError(
                        f"{mask}: would be the mask of {owners[mask]} and of {picture}; give each defect a folder of "
                        f"its own under {ground_truth.name}, named as the one under test"
                    )
            if mine:
                found[picture] = mine
    return found


def _by_picture_name(folder: Path, masks: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Masks by the key of the picture that they may belong to, the most telling name first."""
    named: dict[str, tuple[Path, ...]] = {}
    together: dict[str, tuple[Path, ...]] = {}  # of those in a folder of their picture's name
    places = [(mask, _key(mask.relative_to(folder).with_suffix(""))) for mask in masks]
    for mask, key in places:
        if (shorter := MASK_ENDING.sub("", key)) != key:
            named.setdefault(shorter, (mask,))
    for mask, key in places:
        named.setdefault(key, (mask,))
        parent = key.rpartition("/")[0]
        together[parent] = (*together.get(parent, ()), mask)
    return {**together, **named}


def _key(place: Path) -> str:
    """A path as those of pictures and masks are compared."""
    return place.as_posix().casefold()
