"""Lay a public data set, or pictures with drawn defects, out as MVTec AD is.

    python -m datasets.convert KIND SRC DST

SRC is the unpacked archive, or a folder of pictures with LabelMe's or COCO's JSON; it stays as it is. DST gets a folder
for each category, with {train/good,test/{good,defect},ground_truth/{defect}/{picture}_mask.png}: pictures as hard
links, or copies where the disk cannot; masks of 0 and 255, one a picture. Good pictures to validate on are taken to
learn from. Defects to learn from are left out, and so is a picture whose mask is missing while others of its defect
have theirs. Nothing is written unless all could be.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from datasets import layout
from datasets.annotations import GOOD, Frame, Item, each, inside, measure, read_coco, read_labelme
from datasets.check import check
from datasets.lite_data import write_png
from datasets.mvtec import load_category
from deploy.common import cli
from deploy.common.cli import ArgumentParser, UserError, printable, run_main, warn
from deploy.common.files import hold_folder, make_folder
from deploy.common.imaging import decode, is_image

TEST_SHARE = 0.2  # of the good pictures, where the set does not say which ones are to test on
SEED = 0  # of that choice
DEPTH = 3  # levels below SRC at which categories are looked for
BY_MASK = ""  # in place of a defect: its pictures are good where their mask is empty
LOSSY = (".jpg", ".jpeg")  # masks of these have a fringe of low values


@dataclass(frozen=True)
class Rule:
    """Where pictures of a set are and what they are.

    pictures: a pattern below the category's folder.
    side: `train`, `test`, or empty where the set does not say.
    defect: GOOD, a name, `{folder}` for the folder's name, or BY_MASK.
    masks: a file without its suffix, or a folder of files that are one mask together; `{folder}` and `{parent}` are the
        name and path of the picture's folder, `{stem}` the picture's name. Empty where there are none.
    """

    pictures: str
    side: str
    defect: str
    masks: str = ""


@dataclass(frozen=True)
class Form:
    """One layout of a set.

    needs: patterns below a folder, which is a category if each of them finds something.
    rules: what is in it.
    category: the category's name; empty: that of its folder.
    item: pattern in the path of a picture: those in which it finds the same show one item.
    splits: file beside the category's folder which says what is to test on.
    """

    needs: tuple[str, ...]
    rules: tuple[Rule, ...]
    category: str = ""
    item: str = ""
    splits: str = ""


@dataclass
class Category:
    """Pictures of a category below its folder, and what was decided, in lines."""

    name: str
    folder: Path
    items: list[Item]
    notes: list[str] = field(default_factory=list)


LEARN, TEST = Rule("train/good/*", "train", GOOD), Rule("test/good/*", "test", GOOD)
VALIDATE = Rule("validation/good/*", "train", GOOD)
MT_DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")

FORMS = {
    # {candle,..}/Data/{Images/{Normal,Anomaly}/*.JPG,Masks/Anomaly/*.png (values 0, 1, 2, ..)} and split_csv/1cls.csv
    # (object,split,label,image,mask); or, by its prepare_data.py, {..}/{train/good,test/{good,bad},ground_truth/bad}
    # https://github.com/amazon-science/spot-diff
    "visa": (
        Form(
            needs=("Data/Images/Normal/*", "Data/Masks/Anomaly/*"),
            rules=(
                Rule("Data/Images/Normal/*", "", GOOD),
                Rule("Data/Images/Anomaly/*", "test", "bad", "Data/Masks/Anomaly/{stem}"),
            ),
            splits="split_csv/1cls.csv",
        ),
        Form(
            needs=("train/good/*", "test/bad/*", "ground_truth/bad/*"),
            rules=(LEARN, TEST, Rule("test/bad/*", "test", "bad", "ground_truth/bad/{stem}")),
        ),
    ),
    # {01,02,03}/{train/ok,test/{ok,ko},ground_truth/ko}, .bmp and .png mixed
    # http://avires.dimi.uniud.it/papers/btad/btad.zip
    "btad": (
        Form(
            needs=("train/ok/*", "test/ko/*"),
            rules=(
                Rule("train/ok/*", "train", GOOD),
                Rule("test/ok/*", "test", GOOD, "ground_truth/ok/{stem}"),
                Rule("test/ko/*", "test", "ko", "ground_truth/ko/{stem}"),
            ),
        ),
    ),
    # {bracket_black,..}/{train/good,test/{good,scratches,..},ground_truth/{scratches,..}/*_mask.png}, as MVTec AD
    # https://github.com/stepanje/MPDD
    "mpdd": (
        Form(
            needs=("train/good/*", "test/*/*", "ground_truth/*/*_mask.*"),
            rules=(LEARN, TEST, Rule("test/*/*", "test", "{folder}", "ground_truth/{folder}/{stem}_mask")),
        ),
    ),
    # {juice_bottle,..}/{train/good,validation/good,test/{good,logical_anomalies,structural_anomalies}}/000.png,
    # ground_truth/{logical_anomalies,..}/000/{000,001,..}.png (a value for each kind of defect), defects_config.json
    # https://www.mvtec.com/company/research/datasets/mvtec-loco
    "loco": (
        Form(
            needs=("train/good/*", "validation/good/*", "ground_truth/*/*/*"),
            rules=(LEARN, VALIDATE, TEST, Rule("test/*/*", "test", "{folder}", "ground_truth/{folder}/{stem}")),
        ),
    ),
    # {can,fabric,..}/{train/good,validation/good,test_public/{good,bad,ground_truth/bad/*_mask.png},test_private,
    # test_private_mixed}; the last two have no labels
    # https://www.mvtec.com/company/research/datasets/mvtec-ad-2
    "ad2": (
        Form(
            needs=("train/good/*", "test_public/bad/*"),
            rules=(
                LEARN,
                VALIDATE,
                Rule("test_public/good/*", "test", GOOD),
                Rule("test_public/bad/*", "test", "bad", "test_public/ground_truth/bad/{stem}_mask"),
            ),
        ),
    ),
    # {kos01..kos50}/{Part0.jpg,Part0_label.bmp,..}; a part whose label is empty is good
    # https://www.vicos.si/resources/kolektorsdd
    "kolektor": (
        Form(
            needs=("kos*/*_label.*",),
            rules=(Rule("kos*/*", "", BY_MASK, "{parent}/{stem}_label"),),
            category="kolektor",
            item=r"kos\d+",
        ),
    ),
    # {train,test}/{10000.png,10000_GT.png,..}; a picture whose mask is empty is good
    # https://www.vicos.si/resources/kolektorsdd2
    "kolektor2": (
        Form(
            needs=("train/*_GT.*", "test/*_GT.*"),
            rules=tuple(Rule(f"{side}/*", side, BY_MASK, "{parent}/{stem}_GT") for side in ("train", "test")),
            category="kolektor2",
        ),
    ),
    # MT_{Blowhole,Break,Crack,Fray,Uneven,Free}/Imgs/exp1_num_4727.{jpg,png}: pictures are .jpg, masks .png; the same
    # number is taken for the same tile
    # https://github.com/abin24/Magnetic-tile-defect-datasets.
    "magnetic-tile": (
        Form(
            needs=("MT_Free/Imgs/*.jpg",),
            rules=(
                Rule("MT_Free/Imgs/*.jpg", "", GOOD, "{parent}/{stem}"),
                *(Rule(f"MT_{name}/Imgs/*.jpg", "test", name.lower(), "{parent}/{stem}") for name in MT_DEFECTS),
            ),
            category="magnetic_tile",
            item=r"num_\d+",
        ),
    ),
}
READERS = {"labelme": read_labelme, "coco": read_coco}


def find(kind: str, src: Path) -> list[Category]:
    """The categories of a set below `src`; no picture is read, but masks where they say whether a picture is good.

    Args:
        kind: one of FORMS or READERS.
        src: its folder, or one at most DEPTH levels above its categories; an absolute path.

    Raises:
        UserError: nothing of this kind is there, or what is there is damaged.
    """
    if not src.is_dir():
        raise UserError(f"{src}: no such folder" + (" (unpack the archive)" if src.is_file() else ""))
    if kind in READERS:
        items, notes = READERS[kind](src)
        return [Category(src.name, src, items, notes)]
    found = [(form, folder) for form in FORMS[kind] for folder in _folders(form, src)]
    if not found:
        wanted = " or ".join(" and ".join(form.needs) for form in FORMS[kind])
        like = [name for name, forms in FORMS.items() if any(_folders(form, src) for form in forms)]
        hint = f"; it looks like {', '.join(like)}" if like else ""
        raise UserError(f"{src}: nothing of {kind} in it or {DEPTH} levels below (looked for {wanted}){hint}")
    categories = [_category(form, folder) for form, folder in found]
    for name, count in Counter(category.name for category in categories).items():
        if count > 1:
            folders = " and ".join(str(category.folder) for category in categories if category.name == name)
            raise UserError(f"{folders} are both {name}; name one of them, or what is above it, as SRC")
    return categories


def _folders(form: Form, src: Path) -> list[Path]:
    """The folders of this form that are nearest to `src`."""
    for depth in range(DEPTH + 1):
        folders = src.glob("/".join("*" * depth)) if depth else [src]
        found = sorted(f for f in folders if f.is_dir() and all(any(f.glob(pattern)) for pattern in form.needs))
        if found:
            return found
    return []


def _category(form: Form, folder: Path) -> Category:
    """What the rules of a form find in a folder."""
    category = Category(form.category or folder.name, folder, [])
    claimed: set[Path] = set()  # pictures and masks that a rule has taken

    @functools.cache
    def by_stem(place: Path) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for file in sorted(place.iterdir()) if place.is_dir() else []:
            if is_image(file):
                found[file.stem].append(file)
        return found

    for rule in form.rules:
        pictures = [path for path in sorted(folder.glob(rule.pictures)) if is_image(path) and path not in claimed]
        masks: dict[Path, list[Path]] = {path: [] for path in pictures}
        for path in pictures if rule.masks else []:
            names = {"folder": path.parent.name, "parent": path.parent.relative_to(folder), "stem": path.stem}
            place = folder / rule.masks.format(**names)
            files = [*itertools.chain(*by_stem(place).values())] or by_stem(place.parent).get(place.name, [])
            masks[path] = [file for file in files if file != path]
        claimed.update(pictures, *masks.values())
        pictures = sorted(set(pictures).difference(*masks.values()))
        items = each(pictures, lambda path, r=rule, m=masks: _item(form, r, folder, path, m[path]), "looking")
        for item in items:
            if item.defect:
                category.items.append(item)
            else:
                category.notes.append(f"{item.path}: left out: no mask says whether it is good")
        if rule is VALIDATE and items:
            category.notes.append(f"{len(items)} pictures of validation/good are taken to learn from")
    if form.splits:
        _read_splits(category, folder.parent / form.splits)
    left = [file for file in layout.files_below(folder)[0] if file not in claimed]
    others = Counter("/".join(file.parent.relative_to(folder).parts[:2]) for file in left)
    category.notes += [f"{count} files in {place or folder}: left out" for place, count in sorted(others.items())]
    return category


def _item(form: Form, rule: Rule, folder: Path, picture: Path, masks: list[Path]) -> Item:
    defect = rule.defect.format(folder=picture.parent.name)
    if rule.defect == BY_MASK and masks:
        defect = "defect" if _read_masks(masks).any() else GOOD
    item = re.search(form.item, str(picture.relative_to(folder))) if form.item else None
    together = item.group() if item else str(picture)
    return Item(picture, defect, rule.side, functools.partial(_read_masks, masks) if masks else None, together)


def _read_masks(paths: Sequence[Path], _: Frame | None = None) -> np.ndarray:
    """(H, W) uint8, 255 where any of the files has a value (in lossy ones: of 128 and more)."""
    masks = []
    for path in paths:
        values = decode(path)
        values = values if values.ndim == 2 else values.max(axis=2)
        masks.append(np.uint8(values >= (128 if path.suffix.lower() in LOSSY else 1)) * 255)
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise UserError(f"{path}: has another size than {paths[0]}, which is of the same picture")
    return np.maximum.reduce(masks)


def _read_splits(category: Category, path: Path) -> None:
    """Take the sides of pictures from a table with the columns `split` and `image`, a path from the set's top.

    Raises:
        UserError: it is no such table, or leads out of the set.
    """
    if not path.is_file():
        return
    top = path.parent.parent
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(row["image"], row["split"]) for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: is no table with the columns image and split ({error})") from error
    sides = {inside(path, name, top, top): side for name, side in rows}
    wrong = set(sides.values()) - {"train", "test"}
    if wrong:
        raise UserError(f"{path}: split must be train or test, not {wrong.pop()!r}")
    known = [item for item in category.items if item.path in sides]
    if not known:
        raise UserError(
            f"{path}: names none of the pictures in {category.folder}; put the set's own there or remove it"
        )
    if len(known) < len(category.items):
        category.notes.append(f"{len(category.items) - len(known)} pictures are not in {path}: left out")
    category.items = [replace(item, side=sides[item.path]) for item in known]


def choose(category: Category, share: float) -> Category:
    """Only what can be laid out, each picture with its side.

    Where the set does not say, defects are to test on, and of the good pictures this share, always the same ones.

    Raises:
        UserError: no good picture is there to learn from.
    """
    notes = list(category.notes)
    free = [item for item in category.items if not item.side and item.defect == GOOD]
    groups = sorted({item.together for item in free})
    count = min(max(1, round(share * len(groups))), max(0, len(groups) - 1))
    to_test = {groups[i] for i in np.random.default_rng(SEED).permutation(len(groups))[:count]}
    if free:
        chosen = sum(item.together in to_test for item in free)
        notes.append(
            f"the set does not say what to test on: {chosen} of {len(free)} good pictures are taken for it, always the "
            "same ones (--test_share)"
        )
    masked = {item.defect for item in category.items if item.mask}
    items, to_learn = [], 0
    for item in category.items:
        side = item.side or ("test" if item.defect != GOOD or item.together in to_test else "train")
        if item.defect == GOOD or (side == "test" and (item.mask or item.defect not in masked)):
            items.append(replace(item, side=side))
        elif side == "test":
            notes.append(f"{item.path}: left out: its mask is missing")
        to_learn += item.defect != GOOD and side == "train"
    if to_learn:
        notes.append(f"{to_learn} pictures to learn from have a defect: left out")
    if not any(item.side == "train" for item in items):
        raise UserError(f"{category.folder}: no good picture to learn from")
    return replace(category, items=items, notes=notes)


def write(categories: Sequence[Category], dst: Path) -> None:
    """Lay the categories out below `dst`, all or none; what is left out then is added to their notes.

    Raises:
        UserError: one is there already, pictures or masks cannot be read, `dst` cannot be written.
    """
    for category in categories:
        if os.path.lexists(dst / category.name):
            raise UserError(f"{dst / category.name}: is there already; choose another DST, or move it away")
    empty = not dst.exists()
    aside = make_folder(dst / ".convert")
    hold_folder(aside)
    done: list[Path] = []
    try:
        shutil.rmtree(aside / "new", ignore_errors=True)  # of a process that was killed
        for category in categories:
            _lay_out(category, aside / "new" / category.name)
        for category in categories:
            os.rename(aside / "new" / category.name, dst / category.name)
            done.append(dst / category.name)
    except BaseException:
        for folder in done:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if empty:
            with contextlib.suppress(OSError):  # it holds what was made
                dst.rmdir()


def _lay_out(category: Category, target: Path) -> None:
    stems = _stems(category)
    ambiguous = 0

    def place(item: Item) -> None:
        nonlocal ambiguous
        frame = measure(item.path)
        if item.defect != GOOD and item.mask:
            mask = frame.fit(item.mask(frame), item.path)
            if not mask.any():
                category.notes.append(f"{item.path}: left out: its mask is empty")
                return
            ambiguous += frame.ambiguous
            write_png(target / "ground_truth" / item.defect / f"{stems[item]}_mask.png", np.uint8(mask > 0) * 255)
        folder = make_folder(target / item.side / item.defect)
        _link(item.path.resolve(), folder / f"{stems[item]}{item.path.suffix}")

    each(category.items, place, category.name)
    if ambiguous:
        category.notes.append(
            f"{ambiguous} defect pictures are turned by EXIF without a change of size: masks are taken to be turned"
        )


def _stems(category: Category) -> dict[Item, str]:
    """Names without suffix, unique in each folder in any case: with the folders' names where they would not be."""
    count = Counter((item.side, item.defect, item.path.stem.lower()) for item in category.items)
    taken: set[tuple[str, str, str]] = set()
    stems, renamed = {}, 0
    for item in category.items:
        stem = item.path.stem
        if count[item.side, item.defect, stem.lower()] > 1:
            stem = "_".join((item.path.parent.relative_to(category.folder) / stem).parts)
            renamed += 1
        unique, number = stem, 2
        while (item.side, item.defect, unique.lower()) in taken:
            unique, number = f"{stem}_{number}", number + 1
        taken.add((item.side, item.defect, unique.lower()))
        stems[item] = unique
    if renamed:
        category.notes.append(f"equal names: {renamed} pictures have their folder's name before their own")
    return stems


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def convert(kind: str, src: Path, dst: Path, test_share: float | None = None) -> list[Category]:
    """Lay the set of this kind in `src` out in `dst`, whole or not at all; see `find`, `choose` and `write`.

    Args:
        test_share: of the good pictures that are to test on, where the set does not say; None: TEST_SHARE.

    Raises:
        UserError: as theirs, or `dst` lies in `src`.
    """
    src = Path(os.path.abspath(src))  # what it is called and what stands beside it does not depend on where we are
    if dst.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{dst}: lies in {src}, which stays as it is; choose another DST")
    found = find(kind, src)
    if test_share and all(item.side for category in found for item in category.items):
        warn(f"--test_share {test_share:g} has no effect: {kind} says itself what to test on")
    categories = [choose(category, test_share or TEST_SHARE) for category in found]
    write(categories, dst)
    return categories


def main() -> int:
    kinds = [*FORMS, *READERS]
    parser = ArgumentParser(
        prog="python -m datasets.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", metavar="KIND", choices=kinds, help=", ".join(kinds))
    parser.add_argument("src", metavar="SRC", type=Path, help="folder of the unpacked set, or of one of its categories")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to make the categories in, train.py's --data")
    parser.add_argument(
        "--test_share",
        type=cli.share,
        help=f"share of the good pictures that is to test on, where the set does not say ({TEST_SHARE})",
    )
    args = parser.parse_args()
    code = 0
    for category in convert(args.kind, args.src, args.dst, args.test_share):
        report = check(load_category(args.dst, category.name))
        for line in [*category.notes, *report.lines()]:
            print(f"{printable(category.name)}  {printable(line)}")
        code = max(code, int(bool(report.errors)))
    return code


if __name__ == "__main__":
    run_main(main)
