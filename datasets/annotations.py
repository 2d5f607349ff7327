"""Pictures whose defects are drawn as shapes, in LabelMe's or COCO's JSON: which picture shows what, and its mask.

LabelMe: a `.json` for each picture, beside it under its name or naming it (`imagePath`): `shapes`, each with a
`label`, a `shape_type` and `points` (https://github.com/wkentaro/labelme).
COCO: one `.json` for many pictures: `images`, `categories`, and `annotations` with polygons, run lengths or a box
(https://cocodataset.org/#format-data).
"""

import base64
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from deploy.common.cli import UserError, report_error
from deploy.common.imaging import FORMATS, is_image, read_rgb

GOOD = "good"  # folder of pictures without a defect
COMBINED = "combined"  # MVTec AD's folder of pictures with several kinds of defects
NO_DEFECT = ("good", "ok", "normal", "_background_", "__ignore__")  # labels; the last two are LabelMe's own
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels, as LabelMe's own export draws them
FIXED = 4  # binary places of the coordinates that OpenCV is given
FARTHEST = 1e6  # pixels; OpenCV's coordinates end at 2^27

Size = tuple[int, int]  # height, width
Draw = Callable[[np.ndarray], None]
S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """Height and width of a picture as its file stores it, and as it is read, turned as EXIF's `orientation` says."""

    stored: Size
    shown: Size
    orientation: int

    @property
    def ambiguous(self) -> bool:
        """Whether it is turned or mirrored, but nobody can tell by its size."""
        return self.orientation != 1 and self.stored == self.shown

    def fit(self, mask: np.ndarray, path: Path) -> np.ndarray:
        """(h, w) uint8 mask -> the same over the picture as it is read: turned like it, or resized.

        Raises:
            UserError: its sides have another ratio; the message names the picture's path.
        """
        if mask.shape == self.shown:
            return mask
        if mask.shape == self.stored:
            image = Image.fromarray(mask)
            image.getexif()[ExifTags.Base.Orientation] = self.orientation
            return np.asarray(ImageOps.exif_transpose(image))
        height, width = self.shown
        if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width):
            raise UserError(f"{path}: has {_text(self.shown)} pixels, but its mask {_text(mask.shape)}")
        return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


@dataclass(frozen=True)
class Item:
    """A picture of a set.

    path: its file.
    defect: the folder that it belongs to: GOOD, or the name of its defect.
    side: `train` or `test`; empty where the set does not say.
    mask: makes its mask, uint8 with 0 where it is good, in one of the frame's two sizes or smaller or larger; None
        without one.
    together: pictures with the same text are not divided between train and test.
    """

    path: Path
    defect: str
    side: str = ""
    mask: Callable[[Frame], np.ndarray] | None = None
    together: str = ""


def measure(path: Path) -> Frame:
    """Of a picture, which is not decoded where that can be avoided.

    Raises:
        UserError: it is no picture.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation, stored = image.getexif().get(ExifTags.Base.Orientation, 1), image.size[::-1]
    except Exception:
        orientation, stored = 1, read_rgb(path).shape[:2]  # which says what is wrong
    if orientation not in range(2, 9):
        return Frame(stored, stored, 1)
    shown = read_rgb(path).shape[:2]
    return Frame(shown[::-1] if orientation >= 5 else shown, shown, orientation)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in the folder and its subfolders, sorted, without hidden ones and what is behind links to folders."""
    for top, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(top, name) for name in sorted(names) if not name.startswith("."))


def each(things: Iterable[S], work: Callable[[S], T], doing: str) -> list[T]:
    """What `work` makes of every one; a bar on a terminal shows how far it is.

    Raises:
        UserError: it raised some; each was said in a line of its own.
    """
    results, errors = [], []
    for thing in tqdm(list(things), desc=doing, unit="file", disable=None, leave=False):
        try:
            results.append(work(thing))
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        for error in errors:
            report_error(error)
        raise UserError(
            f"{len(errors)} files cannot be used (see above), so nothing is written; repair them or take them out"
        )
    if errors:
        raise errors[0]
    return results


def read_labelme(src: Path) -> tuple[list[Item], list[str]]:
    """The pictures below `src`, and lines about what was decided.

    A picture without a LabelMe file, or without shapes in it, is good.

    Raises:
        UserError: no LabelMe file, one is damaged, names a picture that is not there or leads out of `src`.
    """
    files = list(files_below(src))
    pictures = [path for path in files if is_image(path)]
    candidates = [path for path in files if path.suffix.lower() == ".json"]
    contents = dict(zip(candidates, each(candidates, _load, "reading"), strict=True))
    found = {path: content for path, content in contents.items() if isinstance(content.get("shapes"), list)}
    if not found:
        raise UserError(f"{src}: nothing of labelme in it (looked for .json files with `shapes`, as LabelMe writes)")
    beside = defaultdict(list)
    for path in pictures:
        beside[path.with_suffix("")].append(path)
    owners = each(found, lambda path: _picture_of(path, found[path], src, beside), "reading")
    shapes = defaultdict(list)
    for (path, content), picture in zip(found.items(), owners, strict=True):
        size = _size(path, content.get("imageHeight"), content.get("imageWidth"))
        for shape in content["shapes"]:
            label = shape.get("label") if isinstance(shape, dict) else None
            shapes[picture].append((label, path, size, partial(_draw_labelme, shape)))
    notes = [f"{path}: is none of LabelMe's files; left out" for path in candidates if path not in found]
    unlabelled = len(pictures) - len(set(owners))
    if unlabelled:
        notes.append(f"{unlabelled} of {len(pictures)} pictures have no LabelMe file: taken as good")
    return _items(pictures, shapes, notes), notes


def read_coco(src: Path) -> tuple[list[Item], list[str]]:
    """The pictures below `src`, and lines about what was decided.

    Every `.json` of COCO's form is read. A picture without annotations, or that none of them names, is good.

    Raises:
        UserError: no such file, one is damaged, names no picture that is there or leads out of `src`.
    """
    files = list(files_below(src))
    pictures = [path for path in files if is_image(path)]
    candidates = [path for path in files if path.suffix.lower() == ".json"]
    contents = dict(zip(candidates, each(candidates, _load, "reading"), strict=True))
    parts = ("images", "annotations", "categories")
    found = {
        path: content
        for path, content in contents.items()
        if all(
            isinstance(content.get(part), list) and all(isinstance(x, dict) for x in content[part]) for part in parts
        )
    }
    if not found:
        raise UserError(f"{src}: nothing of coco in it (looked for a .json file with {', '.join(parts)})")
    by_name = defaultdict(list)
    for path in pictures:
        by_name[path.name].append(path)
    shapes, notes = defaultdict(list), []
    for path, content in found.items():
        missing = _add_coco(path, content, src, by_name, shapes)
        if missing == len(content["images"]):
            raise UserError(f"{path}: none of the {missing} pictures that it names is in {src}")
        if missing:
            notes.append(f"{path}: {missing} of the {len(content['images'])} pictures that it names are not there")
    unlisted = len(pictures) - len(shapes)
    if unlisted:
        notes.append(f"{unlisted} of {len(pictures)} pictures are in no .json file: taken as good")
    return _items(pictures, shapes, notes), notes


def _load(path: Path) -> dict:
    """The object in a JSON file; an empty one for any other value."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error})") from error
    return content if isinstance(content, dict) else {}


def inside(path: Path, name: object, folder: Path, src: Path) -> Path:
    """The file that `path` names, relative to the folder; Windows' separators are understood.

    Raises:
        UserError: it leads out of `src`.
    """
    found = Path(os.path.normpath(folder / str(name).replace("\\", "/")))
    if not found.is_relative_to(os.path.normpath(src)):
        raise UserError(f"{path}: names {name}, which is not in {src}")
    return found


def _size(path: Path, height: object, width: object) -> Size | None:
    """What a JSON file says of a picture's size; None if nothing."""
    if height is None or width is None:
        return None
    try:
        return int(height), int(width)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: a picture's height and width must be numbers ({error})") from error


def _picture_of(path: Path, content: dict, src: Path, beside: dict[Path, list[Path]]) -> Path:
    """The picture of a LabelMe file: the one of its name beside it, else the one that it names."""
    named = str(content.get("imagePath", ""))
    same = beside.get(path.with_suffix(""), [])
    same = [picture for picture in same if len(same) == 1 or named.endswith(picture.name)]
    if len(same) == 1:
        return same[0]
    picture = inside(path, named, path.parent, src)
    if picture not in beside.get(picture.with_suffix(""), []):
        raise UserError(f"{path}: its picture is missing (neither {named} nor one of the file's own name is there)")
    return picture


def _add_coco(path: Path, content: dict, src: Path, by_name: dict[str, list[Path]], shapes: dict[Path, list]) -> int:
    """Add the shapes of one file to those of each picture; how many pictures that it names are not there."""
    images, missing = {}, 0
    labels = {category.get("id"): category.get("name") for category in content["categories"]}
    for image in content["images"]:
        place = inside(path, image.get("file_name", ""), path.parent, src)
        same = by_name.get(place.name, [])
        # The folder may be left out, or one of the machine where it was made.
        same = [p for p in same if p == place] or [p for p in same if p.parent.name == place.parent.name] or same
        if len(same) > 1:
            raise UserError(f"{path}: {place.name} may be {same[0]} or {same[1]}; write the folder into file_name")
        images[image.get("id")] = None
        if same:
            images[image.get("id")] = same[0], _size(path, image.get("height"), image.get("width"))
            shapes.setdefault(same[0], [])  # known, even if nothing is drawn on it
        missing += not same
    for annotation in content["annotations"]:
        where, what = annotation.get("image_id"), annotation.get("category_id")
        if where not in images or what not in labels:
            raise UserError(
                f"{path}: annotation {annotation.get('id')} is of image {where}, category {what}: not listed"
            )
        if images[where]:
            picture, size = images[where]
            shapes[picture].append((labels[what], path, size, partial(_draw_coco, annotation)))
    return missing


def _items(
    pictures: Iterable[Path], shapes: dict[Path, list[tuple[object, Path, Size | None, Draw]]], notes: list[str]
) -> list[Item]:
    """A picture with what is drawn on it: its label, the file that says so, the size there, how to draw it."""
    items, ignored, several = [], defaultdict(int), 0
    for picture in pictures:
        drawn = []
        for shape in shapes.get(picture, []):
            folder = folder_name(shape[0])
            if folder.lower() in NO_DEFECT:
                ignored[folder] += 1
            else:
                drawn.append((folder, *shape[1:]))
        folders = {folder for folder, *_ in drawn}
        several += len(folders) > 1
        defect = GOOD if not folders else folders.pop() if len(folders) == 1 else COMBINED
        mask = partial(_draw_all, picture, [shape[1:] for shape in drawn]) if drawn else None
        items.append(Item(picture, defect, mask=mask, together=str(picture)))
    notes += [f"{count} shapes are labelled {label}: no defect" for label, count in sorted(ignored.items())]
    if several:
        notes.append(f"{several} pictures have shapes of several labels: in {COMBINED}")
    return items


def folder_name(label: object) -> str:
    """A label as the name of a folder on any system."""
    return re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", "" if label is None else str(label)).strip(". ") or "defect"


def _draw_all(picture: Path, shapes: list[tuple[Path, Size | None, Draw]], frame: Frame) -> np.ndarray:
    """All shapes of a picture in one mask over the picture as it is read."""
    canvases = {frame.shown: np.zeros(frame.shown, np.uint8)}
    for path, size, draw in shapes:
        size = size or frame.shown
        if size not in (frame.shown, frame.stored):
            raise UserError(f"{path}: was made for {_text(size)} pixels, but {picture} has {_text(frame.shown)}")
        try:
            draw(canvases.setdefault(size, np.zeros(size, np.uint8)))
        except Exception as error:  # whatever may stand in such a file
            raise UserError(f"{path}: a shape on {picture.name} cannot be drawn ({error!r})") from error
    return np.maximum.reduce([frame.fit(canvas, picture) for canvas in canvases.values()])


def _draw_labelme(shape: dict, canvas: np.ndarray) -> None:
    """Draw one shape with 1; coordinates are pixels from the upper left corner of the picture, x first."""
    kind, points = shape.get("shape_type") or "polygon", _points(shape["points"])
    if kind == "mask":
        left, top = np.int64(points[0])
        patch = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=["PNG"])) > 0
        canvas[top : top + patch.shape[0], left : left + patch.shape[1]] |= patch
    elif kind == "circle":
        radius = np.hypot(*(points[1] - points[0]))
        cv2.circle(canvas, _fixed(points[0]), int(radius * 2**FIXED), 1, cv2.FILLED, cv2.LINE_8, FIXED)
    elif kind in ("line", "linestrip"):
        cv2.polylines(canvas, [np.int32([_fixed(p) for p in points])], False, 1, LINE_WIDTH, cv2.LINE_8, FIXED)
    elif kind in ("point", "points"):
        for point in points:
            cv2.circle(canvas, _fixed(point), POINT_RADIUS * 2**FIXED, 1, cv2.FILLED, cv2.LINE_8, FIXED)
    elif kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        _fill(canvas, [(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind in ("polygon", "rectangle", "rotation"):  # X-AnyLabeling writes rectangles with four corners
        _fill(canvas, points)
    else:
        raise ValueError(f"shape_type {kind} is not known")


def _draw_coco(annotation: dict, canvas: np.ndarray) -> None:
    """Draw the segmentation of one annotation with 1, or its box if it has none."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        size, counts = segmentation["size"], segmentation["counts"]
        counts = _counts(counts) if isinstance(counts, str) else counts
        if tuple(size) != canvas.shape or sum(counts) != canvas.size:
            raise ValueError(f"run lengths of {size} for a picture of {list(canvas.shape)}")
        runs = np.repeat(np.arange(len(counts)) % 2, counts)
        canvas |= runs.reshape(canvas.shape[::-1]).T.astype(np.uint8)  # by columns
    elif segmentation:
        for polygon in segmentation:
            _fill(canvas, _points(np.reshape(polygon, (-1, 2))))
    else:
        left, top, width, height = annotation["bbox"]
        _fill(canvas, _points([(left, top), (left + width, top), (left + width, top + height), (left, top + height)]))


def _counts(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character from 0 upwards, the sixth says that more follow, the last
    one's fifth is the sign; from the fourth on a number is the difference from the one two before."""
    counts, value, bits = [], 0, 0
    for character in text:
        code = ord(character) - ord("0")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << bits - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts


def _points(points: object) -> np.ndarray:
    """(N, 2) float."""
    array = np.asarray(points, dtype=float)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array) or not (abs(array) < FARTHEST).all():
        raise ValueError("points must be pairs of numbers within the picture")
    return array


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """As OpenCV takes it: it puts pixel 0's centre at 0, the files its edge."""
    x, y = np.rint((np.asarray(point) - 0.5) * 2**FIXED)
    return int(x), int(y)


def _fill(canvas: np.ndarray, points: Iterable) -> None:
    """The polygon with these corners, and what its outline touches."""
    cv2.fillPoly(canvas, [np.int32([_fixed(point) for point in points])], 1, cv2.LINE_8, FIXED)


def _text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
