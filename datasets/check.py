"""What a category is made of and what is wrong with it: python -m datasets.check --data ./data

train.py runs it before anything else. Every file is decoded once, by the code that reads it in training.
"""

import argparse
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import layout
from datasets.mvtec import LARGEST_INDEX, READERS, Category, hold_out, list_categories, load_category
from deploy.common.cli import ArgumentParser, UserError, printable, report_error, run_main, share
from deploy.common.imaging import FORMATS, FULL_WHITE, decode

HOLDOUT = 0.1  # share of the good pictures that the configs for one's own pictures hold out
USUAL_RATE = 0.05  # of false alarms, which eval.py promises where it is not told another
CAMERAS = (255, 1023, 4095, 16383, FULL_WHITE)  # white of 8, 10, 12, 14 and 16 bit
NAMED = 3  # examples in a line
IN_ONE_ERROR = 20  # errors that one line names


@dataclass(frozen=True)
class Seen:
    """What a file holds; of 16 bit also its largest value and the greatest common divisor of its values."""

    path: Path
    error: str | None = None
    width: int = 0
    height: int = 0
    mode: str = ""  # Pillow's word, and the bits of a channel
    pages: int = 1
    digest: bytes = b""  # of the decoded pixels
    values: tuple[int, ...] = ()  # of masks
    marked: float = 0  # share of a mask's pixels that are not 0
    highest: int = 0
    step: int = 0

    @property
    def size(self) -> str:
        """Width x height in pixels."""
        return f"{self.width}x{self.height}"


@dataclass
class Group:
    """The pictures of one folder, or the masks; how many of each size and mode there are."""

    folder: str
    taken_for: str
    files: int
    sizes: dict[str, int]
    modes: dict[str, int]
    values: list[int] | None = None  # of masks
    masks: int | None = None  # how many defect pictures have one

    def line(self) -> str:
        """For people to read."""
        masks = "" if self.masks is None else f", {self.masks or 'none'} with a mask"
        parts = [f"{self.files} {self.taken_for}{masks}", _counts(self.sizes), _counts(self.modes)]
        if self.values is not None:
            few = len(self.values) <= 6
            parts.append("values " + (" ".join(map(str, self.values)) if few else f"0 to {max(self.values)}"))
        return f"{self.folder}: {'; '.join(part for part in parts if part)}"


@dataclass
class Report:
    """What there is, and what is wrong with it: `errors` stop a training, `warnings` do not."""

    category: str
    groups: list[Group] = field(default_factory=list)
    white_level: int | None = None  # of 16-bit training pictures; None: there are none
    held_out: int = 0
    lowest_false_alarm_rate: float | None = None  # that so many held-out pictures can promise
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people to read."""
        lines = [*(group.line() for group in self.groups), *self.notes]
        lines += [f"warning: {text}" for text in self.warnings]
        return [printable(line) for line in [*lines, *(f"error: {text}" for text in self.errors)]]

    def stop_at_errors(self) -> None:
        """
        Raises:
            UserError: there are errors; it names them.
        """
        if self.errors:
            more = len(self.errors) - IN_ONE_ERROR
            text = "; ".join(self.errors[:IN_ONE_ERROR]) + (f"; and {more} more" if more > 0 else "")
            raise UserError(f"category {self.category}: {text}")


def check(category: Category, holdout: float = HOLDOUT, white_level: int | None = None) -> Report:
    """Look at every picture and mask of a category.

    Args:
        category: what `load_category` has found.
        holdout: share of the good pictures under train that the training will not see.
        white_level: what the user says of 16-bit pictures; None: the training pictures tell it.
    """
    report = Report(category.name)
    pictures = [*category.train, *(image.path for image in category.test)]
    masks = list(dict.fromkeys(mask for image in category.test for mask in image.masks))
    masked = {image.path for image in category.test if image.masks}
    files = [*pictures, *masks]
    seen = {one.path: one for one in _look_at(files, set(masks))}
    report.errors += [one.error for one in seen.values() if one.error]

    root = category.folder
    sound = {path: one for path, one in seen.items() if not one.error}
    for folder in (*category.good_folders, *category.test_folders):
        files = [sound[path] for path in folder.pictures if path in sound]
        learnt = ", to learn from" if folder in category.good_folders else ""
        kind = "with a defect" if folder.defect else f"good{learnt}"
        report.groups.append(_group(str(folder.path.relative_to(root)), kind, files))
        if folder.defect:
            report.groups[-1].masks = len(masked.intersection(folder.pictures))
        if folder.defect and layout.looks_good(folder.defect):
            report.warnings.append(
                f"{folder.path.relative_to(root)} was taken for a defect; if its pictures are good, rename it to good"
            )
    if masks:
        files = [sound[path] for path in masks if path in sound]
        report.groups.append(_group(str(category.ground_truth.relative_to(root)), "masks", files))
        report.groups[-1].values = sorted({value for one in files for value in one.values})
    for folder in (*category.good_folders, *category.test_folders):
        if inside := layout.masks_among(folder):
            report.warnings.append(
                f"{folder.path.relative_to(root)} has masks among its pictures ({_paths(inside, category)}); move them "
                f"to {layout.find(root, layout.MASKS) or root / 'ground_truth'}/{folder.path.name}"
            )
    if len({bool(folder.defect) for folder in category.test_folders}) == 1:
        lacking = "good picture" if category.test_folders[0].defect else "picture with a defect"
        report.warnings.append(f"test has no {lacking}: no AUROC; only -o selection=last or val_likelihood will do")
    trained, all_read = ([sound[path] for path in some if path in sound] for some in (category.train, pictures))
    _find_white(report, trained, all_read, white_level)
    _check_masks(report, category, sound)
    _find_twice(report, category, sound)
    _name_what_is_left_out(report, category, sound)
    _count_held_out(report, category, holdout)
    return report


def find_white(highest: int, step: int) -> int:
    """The value of white of the camera that 16-bit pictures are from.

    Args:
        highest: the largest value in them.
        step: the greatest common divisor of their values: 16 of a camera that writes 12 bit at the upper end.

    Returns:
        the smallest of 255, 1023, 4095, 16383 and 65535 that no value is above; of pictures that fill the upper end of
        16 bit, their largest possible value.
    """
    white = next(level for level in CAMERAS if highest <= level)
    shift = (step & -step).bit_length() - 1 if step else 0  # zero bits at the lower end
    # Dark pictures of 12 bit at the upper end may keep below 16384: 16 as the step tells them from those of 14 bit.
    if white == FULL_WHITE or (shift == 4 and white == 16383):
        return FULL_WHITE >> shift << shift if shift <= 6 else FULL_WHITE
    return white


def _look_at(files: Sequence[Path], masks: set[Path]) -> Iterable[Seen]:
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda path: _look(path, path in masks), files)
        yield from tqdm(found, "check", len(files), unit="file", disable=None, leave=False)


def _look(path: Path, is_mask: bool) -> Seen:
    """Decode one file; all but a few numbers of it is dropped."""
    try:
        array = decode(path)
    except UserError as error:
        return Seen(path, error=str(error))
    with Image.open(path, formats=FORMATS) as image:
        mode, pages = image.mode, getattr(image, "n_frames", 1)
    deep = array.dtype == np.uint16
    values = (
        np.flatnonzero(np.bincount(array.ravel(), minlength=FULL_WHITE + 1)) if deep or is_mask else np.zeros(1, int)
    )
    return Seen(
        path,
        width=array.shape[1],
        height=array.shape[0],
        mode=f"{mode.partition(';')[0]} {16 if deep else 8} bit",
        pages=pages,
        digest=hashlib.blake2b(array.data, digest_size=16, key=str(array.shape).encode()).digest(),
        values=tuple(values.tolist()) if is_mask and len(values) <= 256 else (),
        marked=float((array.reshape(*array.shape[:2], -1) > 0).any(axis=2).mean()) if is_mask else 0,
        highest=int(values[-1]) if deep else 0,
        step=int(np.gcd.reduce(values)) if deep else 0,
    )


def _group(name: str, taken_for: str, files: Sequence[Seen]) -> Group:
    sizes, modes = Counter(one.size for one in files), Counter(one.mode for one in files)
    return Group(name, taken_for, len(files), dict(sizes.most_common()), dict(modes.most_common()))


def _find_white(report: Report, trained: Sequence[Seen], pictures: Sequence[Seen], given: int | None) -> None:
    deep = [one for one in trained if one.highest or "16 bit" in one.mode]
    if not deep:
        report.white_level = given
        return
    highest, step = max(one.highest for one in deep), math.gcd(*(one.step for one in deep))
    report.white_level = given or find_white(highest, step)
    why = "as white_level says" if given else "white_level=N says otherwise"
    report.notes.append(
        f"16 bit: the largest value of the training pictures is {highest}; {report.white_level} is white ({why})"
    )
    brighter = [one for one in pictures if one.highest > report.white_level]
    if brighter:
        report.warnings.append(f"brighter than white ({report.white_level}): {_examples(brighter)}")


def _check_masks(report: Report, category: Category, sound: dict[Path, Seen]) -> None:
    defects = [image for image in category.test if image.defect]
    without = sorted({image.defect for image in defects if not image.masks})  # all pictures of these lack one
    if category.ground_truth:
        used = {mask.resolve() for image in category.test for mask in image.masks}
        there = layout.files_below(category.ground_truth)[0]
        good = [folder.path.name for folder in category.test_folders if not folder.defect]
        unused = [
            m
            for m in there
            if m.resolve() not in used and not set(m.relative_to(category.ground_truth).parts) & {*good}
        ]
        place = category.ground_truth.relative_to(category.folder)
        if unused and not used and defects:
            wanted = f"{place}/{defects[0].defect}/{defects[0].path.stem}_mask.png"
            report.warnings.append(
                f"{place} is there, but none of its masks belongs to a test picture: {_paths(unused, category)}; "
                f"wanted: {wanted}"
            )
            return
        if unused:
            report.warnings.append(f"masks that belong to no test picture: {_paths(unused, category)}")
    if without and any(image.masks for image in defects):
        report.warnings.append(f"without masks: {', '.join(without)}; so there will be no pixel figures at all")
    _check_marks(report, [sound[mask] for image in defects for mask in image.masks if mask in sound])
    odd = [
        sound[mask]
        for image in defects
        for mask in image.masks
        if mask in sound and image.path in sound and _other_shape(sound[mask], sound[image.path])
    ]
    if odd:
        report.warnings.append(f"masks of another shape than their pictures, which are stretched: {_examples(odd)}")


def _check_marks(report: Report, masks: Sequence[Seen]) -> None:
    alpha = " (alpha does not count: save them grey)" if any("A 8 bit" in mask.mode for mask in masks) else ""
    if blank := [mask for mask in masks if not mask.marked]:
        report.warnings.append(f"masks that mark nothing{alpha}: {_examples(blank)}")
    highest = max((max(mask.values, default=255) for mask in masks), default=0)
    if LARGEST_INDEX < highest < 255:
        report.warnings.append(
            f"no mask has a value above {highest}: mask_rule: published counts none of their pixels and takes the "
            "pictures for good ones; give -o mask_rule=nonzero"
        )
    if masks and all(mask.marked > 0.5 for mask in masks):
        report.warnings.append(
            f"every mask marks more than half of its picture; if the defect is black in them, invert them{alpha}: "
            f"{_examples(masks)}"
        )


def _other_shape(mask: Seen, picture: Seen) -> bool:
    return abs(mask.width * picture.height / (mask.height * picture.width) - 1) > 0.05


def _find_twice(report: Report, category: Category, sound: dict[Path, Seen]) -> None:
    """The same pixels in places where they must not be, or need not be."""
    places: dict[bytes, dict[str, Path]] = defaultdict(dict)
    twice = 0
    for path in category.train:
        if path in sound:
            twice += "train" in places[sound[path].digest]
            places[sound[path].digest].setdefault("train", path)
    for image in category.test:
        if image.path in sound:
            places[sound[image.path].digest].setdefault("defect" if image.defect else "good", image.path)
    for first, second, what in (
        ("train", "good", "learnt from and tested on"),
        ("train", "defect", "learnt from as good, tested as a defect"),
        ("good", "defect", "tested as good and as a defect"),
    ):
        pairs = [(found[first], found[second]) for found in places.values() if {first, second} <= found.keys()]
        if pairs:
            one, other = (path.relative_to(category.folder) for path in pairs[0])
            more = f" and {len(pairs) - 1} more" if pairs[1:] else ""
            report.warnings.append(f"the same picture {what}: {one} is {other}{more}")
    if twice:
        report.notes.append(f"train: {twice} of {len(category.train)} pictures are there more than once")


def _name_what_is_left_out(report: Report, category: Category, sound: dict[Path, Seen]) -> None:
    used = {folder.path for folder in (*category.good_folders, *category.test_folders)}
    others = [path for folder in (*category.good_folders, *category.test_folders) for path in folder.others]
    if others:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
        report.notes.append(
            f"left out, no pictures that are read: {_counts(dict(kinds.most_common()))} ({_paths(others, category)})"
        )
    tops = [category.folder, *dict.fromkeys(path.parent for path in used)]
    for top in tops:
        direct = [path for path in top.iterdir() if path.is_file() and layout.is_image(path)]
        if direct:
            report.warnings.append(
                f"left out: {len(direct)} pictures that lie in {top.name} itself ({_paths(direct, category)})"
            )
        for folder in layout.subfolders(top):
            if folder not in (*used, *tops, category.ground_truth) and (pictures := layout.files_below(folder)[0]):
                report.warnings.append(f"left out: {folder.relative_to(category.folder)}, {len(pictures)} pictures")
    many = [one for one in sound.values() if one.pages > 1]
    if many:
        report.warnings.append(f"only the first page is read of {_examples(many)}")


def _count_held_out(report: Report, category: Category, holdout: float) -> None:
    try:
        report.held_out = len(hold_out(category.train, holdout, seed=0)[1])
    except UserError as error:
        report.errors.append(str(error))
        return
    if not report.held_out:
        return
    report.lowest_false_alarm_rate = lowest = 1 / (report.held_out + 1)
    wanted = math.ceil((1 / USUAL_RATE - 1) / holdout)
    advice = "" if lowest <= USUAL_RATE else f" ({USUAL_RATE:g} takes {wanted} good pictures)"
    report.notes.append(f"held out: {report.held_out}; false alarms they can promise: {lowest:.2g}{advice}")


def _counts(counts: dict[str, int]) -> str:
    """`256x256`, or `256x256 (20), 300x200 (3) and 2 more`."""
    if len(counts) <= 1:
        return "".join(counts)
    more = f" and {len(counts) - NAMED} more" if len(counts) > NAMED else ""
    return ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:NAMED]) + more


def _examples(files: Sequence[Seen]) -> str:
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(str(one.path) for one in files[:NAMED]) + more


def _paths(files: Sequence[Path], category: Category) -> str:
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(str(path.relative_to(category.folder)) for path in files[:NAMED]) + more


def _holdout(text: str) -> float:
    return 0 if text == "0" else share(text)  # as published, none is held out


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m datasets.check", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--data", default="./data", help="folder of the categories (%(default)s)")
    parser.add_argument("-cat", "--category", default="all", help="name of a folder under --data (%(default)s)")
    parser.add_argument("--holdout", type=_holdout, default=HOLDOUT, help="as in the config (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, a report a category")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    data = Path(args.data)
    reports = {}
    for name in list_categories(data) if args.category == "all" else [args.category]:
        try:
            reports[name] = check(load_category(data, name), args.holdout)
        except UserError as error:
            reports[name] = Report(name, errors=[str(error)])
        if not args.json:
            print(*(f"{printable(name)}  {line}" for line in reports[name].lines()), sep="\n", flush=True)
    if args.json:
        print(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=2, ensure_ascii=False))
    wrong = [name for name, report in reports.items() if report.errors]
    if wrong:
        report_error(UserError(f"--data {data}: not fit for training: {', '.join(wrong)}"))
    return 2 if wrong else 0


if __name__ == "__main__":
    run_main(main)
