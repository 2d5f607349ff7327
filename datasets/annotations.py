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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from datasets import layout
from deploy.common.cli import UserError, report_error
from deploy.common.imaging import FORMATS, decode

GOOD = "good"  # folder of pictures without a defect
COMBINED = "combined"  # MVTec AD's folder of pictures with several kinds of defects
NO_DEFECT = ("_background_", "__ignore__")  # labels of LabelMe's own
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
        orientation, stored = 1, decode(path).shape[:2]  # which says what is wrong
    if orientation not in range(2, 9):
        return Frame(stored, stored, 1)
    shown = decode(path).shape[:2]
    return Frame(shown[::-1] if orientation >= 5 else shown, shown, orientation)


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
    pictures, contents = _look(src)
    found = {path: content for path, content in contents.items() if isinstance(content.get("shapes"), list)}
    if not found:
        raise UserError(f"{src}: nothing of labelme in it (looked for .json files with `shapes`, as LabelMe writes)")
    by_name = _by_name(pictures)
    beside = defaultdict(list)
    for path in pictures:
        beside[path.with_suffix("")].append(path)

    def owner(path: Path) -> Path:
        named = str(found[path].get("imagePath"))
        same = beside.get(path.with_suffix(""), [])
        same = [picture for picture in same if len(same) == 1 or named.endswith(picture.name)]
        picture = same[0] if len(same) == 1 else _picture_named(path, named, src, by_name)
        if picture is None:
            raise UserError(f"{path}: its picture is missing (neither one of its name nor {named} is there)")
        return picture

    owners = each(found, owner, "reading")
    shapes = defaultdict(list)
    for (path, content), picture in zip(found.items(), owners, strict=True):
        size = _size(path, content.get("imageHeight"), content.get("imageWidth"))
        for shape in content["shapes"]:
            label = shape.get("label") if isinstance(shape, dict) else None
            shapes[picture].append((label, path, size, partial(_draw_labelme, shape)))
    notes = [f"{path}: is none of LabelMe's files; left out" for path in contents if path not in found]
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
    pictures, contents = _look(src)
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
    by_name = _by_name(pictures)
    shapes, notes = defaultdict(list), []
    for path, content in found.items():
        missing = _add_coco(path, content, src, by_name, shapes)
        if content["images"] and missing == len(content["images"]):
            raise UserError(f"{path}: none of the {missing} pictures that it names is in {src}")
        if missing:
            notes.append(f"{path}: {missing} of the {len(content['images'])} pictures that it names are not there")
    unlisted = len(pictures) - len(shapes)
    if unlisted:
        notes.append(f"{unlisted} of {len(pictures)} pictures are in no .json file: taken as good")
    return _items(pictures, shapes, notes), notes


def _look(src: Path) -> tuple[list[Path], dict[Path, dict]]:
    """The pictures below `src`, and the JSON files with the object in each."""
    pictures, others = layout.files_below(src)
    files = [path for path in others if path.suffix.lower() == ".json"]
    return pictures, dict(zip(files, each(files, _load, "reading"), strict=True))


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
    if not found.is_relative_to(src):
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


def _by_name(pictures: Iterable[Path]) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in pictures:
        found[path.name].append(path)
    return found


def _picture_named(path: Path, name: object, src: Path, by_name: dict[str, list[Path]]) -> Path | None:
    """The picture that a JSON file names: there, or, as folders are left out or moved, the only one of that name."""
    place = inside(path, name, path.parent, src)
    same = by_name.get(place.name, [])
    same = [p for p in same if p == place] or [p for p in same if p.parent.name == place.parent.name] or same
    if len(same) > 1:
        raise UserError(f"{path}: {place.name} may be {same[0]} or {same[1]}; write the folder's name before it")
    return same[0] if same else None


def _add_coco(path: Path, content: dict, src: Path, by_name: dict[str, list[Path]], shapes: dict[Path, list]) -> int:
    """Add the shapes of one file to those of each picture; how many pictures that it names are not there."""
    images, missing = {}, 0
    labels = {str(category.get("id")): category.get("name") for category in content["categories"]}
    for image in content["images"]:
        picture = _picture_named(path, image.get("file_name"), src, by_name)
        images[str(image.get("id"))] = picture and (picture, _size(path, image.get("height"), image.get("width")))
        if picture:
            shapes.setdefault(picture, [])  # known, even if nothing is drawn on it
        missing += picture is None
    for annotation in content["annotations"]:
        where, what = (str(annotation.get(key)) for key in ("image_id", "category_id"))
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
    folders: dict[str, str] = {}  # names that `layout` takes for one are one
    for picture in pictures:
        drawn = []
        for label, *shape in shapes.get(picture, []):
            name = folder_name(label)
            if layout.is_good(name) or name in NO_DEFECT:
                ignored[name] += 1
            else:
                drawn.append((folders.setdefault(layout.plain(name), name), *shape))
        kinds = {name for name, *_ in drawn}
        several += len(kinds) > 1
        defect = GOOD if not kinds else kinds.pop() if len(kinds) == 1 else COMBINED
        mask = partial(_draw_all, picture, [shape[1:] for shape in drawn]) if drawn else None
        items.append(Item(picture, defect, mask=mask, together=str(picture)))
    notes += [f"{count} shapes are labelled {label}: no defect" for label, count in sorted(ignored.items())]
    if several:
        notes.append(f"{several} pictures have shapes of several labels: in {COMBINED}")
    return items


def folder_name(label: object) -> str:
    """A label as the name of a folder of pictures on any system."""
    name = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", "" if label is None else str(label)).strip(". ") or "defect"
    return f"{name} defect" if layout.plain(name) in layout.MASKS else name


def _draw_all(picture: Path, shapes: list[tuple[Path, Size | None, Draw]], frame: Frame) -> np.ndarray:
    """All shapes of a picture in one mask over the picture as it is read."""
    canvases = {frame.shown: np.zeros(frame.shown, np.uint8)}
    for path, size, draw in shapes:
        size = size or frame.shown
        if size not in (frame.shown, frame.stored):
            raise UserError(f"{path}: was made for {_text(size)} pixels, but {picture} has {_text(frame.shown)}")
        try:
            if size not in canvases:
                canvases[size] = np.zeros(size, np.uint8)
            draw(canvases[size])
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
