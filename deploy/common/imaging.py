"""Pictures in, pictures out: reading, preprocessing, drawing. Arrays only, no framework."""

import contextlib
import glob
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from deploy.common.bombs import Bomb, check_size, check_structure
from deploy.common.cli import UserError, escaped, warn
from deploy.common.files import regular_file, write_whole

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # what is inside decides; nothing that starts another program
# Of ImageNet, RGB, for pictures in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
FULL_WHITE = 65535  # of 16-bit pictures where nobody says otherwise
FONT = cv2.FONT_HERSHEY_SIMPLEX
MARKED, TRUE = (255, 0, 0), (0, 255, 255)  # outlines, RGB: told apart in grey too
MOST_BOXES = 20  # in a drawing
PUBLISHED_THRESHOLD = 0.8  # of image and pixel scores
PUBLISHED_RULE = "published"  # which says so


def list_images(*paths: str | Path) -> list[Path]:
    """Files: a file itself, the pictures of a folder (not of its subfolders) or what a glob pattern matches, sorted.

    Those of several paths come in the order of these, a file once, whatever paths lead to it. Files that are named, by
    a pattern too, are taken at their word: reading one that is no picture says so.

    Raises:
        UserError: nothing there, for one of the paths.
    """
    found = [file for path in paths for file in _files_at(str(path))]
    folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in found}}
    once: dict[tuple[str, str], Path] = {}
    for file in found:
        once.setdefault((folders[file.parent], file.name), file)
    return list(once.values())


def _files_at(path: str) -> list[Path]:
    try:
        if path and Path(path).is_dir():
            found = [file for file in Path(path).iterdir() if is_image(file)]
            if not found:
                below = any(file.is_dir() for file in Path(path).iterdir())
                advice = f"; for its subfolders: '{os.path.join(path, '**', '*.png')}' or the like" * below
                raise UserError(f"{path}: no picture in this folder ({' '.join(SUFFIXES)}){advice}")
        elif path and Path(path).exists():
            return [Path(path)]
        else:
            found = list({file for file in matches(path) if not file.is_dir()})
    except OSError as error:  # a name too long, a folder that may not be read
        raise UserError(f"{path}: cannot be looked at ({error.strerror})") from error
    if not found:
        raise UserError(f"{path or 'empty path'}: no such file, folder or pattern with pictures")
    return sorted(found)


def matches(pattern: str) -> Iterator[Path]:
    """What `glob.glob(pattern, recursive=True)` finds, some of it more than once, without a list of it in memory.

    `**` enters no link: two in circles would take for ever.
    """
    separators = re.escape(os.sep + (os.altsep or ""))  # Windows has two
    head, *tails = re.split(rf"(?:^|(?<=[{separators}]))\*\*(?:[{separators}]|$)", pattern, maxsplit=1)
    if not tails:
        yield from map(Path, glob.iglob(pattern))
        return
    for top in glob.iglob(head) if head else ["."]:
        for folder, below, _ in os.walk(top):
            below[:] = [name for name in below if not name.startswith(".")]
            yield from matches(os.path.join(glob.escape(folder), tails[0] or "*"))


def drawing_paths(images: Sequence[Path], folder: Path, suffix: str = ".jpg") -> dict[Path, Path]:
    """Where to write the drawing of each picture: `folder`, the subfolders in which the pictures differ, name.jpg.

    No two have the same place: the whole name of the picture is kept, `a.png.jpg` is not `a.jpg.jpg`. Maps and masks,
    of another suffix, are named in the same way.

    Raises:
        UserError: beside several pictures; who asks for all of their folder again would get the drawings scored.
    """
    whole = {path: Path(os.path.abspath(path)) for path in images}  # some may be relative, or lead up
    top = os.path.commonpath([path.parent for path in whole.values()])
    drawings = {path: folder / f"{whole[path].relative_to(top)}{suffix}" for path in images}
    beside = {path.parent.resolve() for path in images} & {path.parent.resolve() for path in drawings.values()}
    if len(images) > 1 and beside:
        raise UserError(f"{beside.pop()}: holds the pictures; their drawings must go to another folder, or move them")
    return drawings


def is_image(path: Path) -> bool:
    """Whether this is a file whose name ends like a picture's, in any case; hidden files are not."""
    return named_like_image(path.name) and path.is_file()


def named_like_image(name: str) -> bool:
    """Whether the name of a file ends like a picture's, in any case; those of hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_rgb(path: Path, content: BinaryIO | None = None, max_pixels: float = math.inf) -> np.ndarray:
    """Decode a picture of any mode to (H, W, 3) uint8 RGB, of 16 bit with 65535 as white; see `decode`.

    Raises:
        UserError: as `decode`.
    """
    return to_rgb(decode(path, content, max_pixels), FULL_WHITE)


class PictureReader:
    """Reads the pictures of one model: those of 16 bit with the white that its training pictures had.

    Other pictures may be brighter; then it warns, once.
    """

    def __init__(self, white_level: int | None) -> None:
        """`white_level`: the value of white, up to 65535; None: the model has learnt from pictures of 8 bit."""
        self._white = white_level
        self._warned = False

    def __call__(self, picture: str | Path | np.ndarray | Image.Image) -> np.ndarray:
        """(H, W, 3) uint8 RGB of a file, of an array as `as_array` takes it, or of a picture of Pillow's.

        Raises:
            UserError: as `decode`; an array of another kind.
        """
        name = picture if isinstance(picture, str | Path) else "a picture given as an array"
        if isinstance(picture, Image.Image):
            array = _as_array(ImageOps.exif_transpose(picture), name := "a picture of Pillow's")
        else:
            array = as_array(picture) if isinstance(picture, np.ndarray) else decode(Path(picture))
        if not self._warned and (odd := odd_white(array, self._white)):
            self._warned = True
            warn(f"{name}: {odd}; later ones like it are not named")
        return to_rgb(array, self._white or FULL_WHITE)


def as_array(picture: np.ndarray) -> np.ndarray:
    """The same array, if it is what `decode` could have given: (H, W, 3) RGB or (H, W) grey, uint8 or uint16.

    Raises:
        UserError: it is not.
    """
    shape, kind = picture.shape, picture.dtype
    if kind not in (np.uint8, np.uint16) or not picture.size or (len(shape) != 2 and shape[2:] != (3,)):
        raise UserError(
            f"a picture given as an array {list(shape)} of {kind}: must be (height, width, 3) in RGB, or "
            "(height, width), of uint8 or uint16"
        )
    return picture


def odd_white(array: np.ndarray, white_level: int | None) -> str | None:
    """What is wrong with a decoded picture for a model of this white level; None: nothing."""
    if array.dtype != np.uint16:
        return None
    if white_level is None:
        return f"is of 16 bit, those of the training were of 8; {FULL_WHITE} is taken for white (see white_level)"
    highest = int(array.max())
    if highest > white_level:
        return f"has values up to {highest}; all above white_level {white_level} is white"
    return None


def to_rgb(array: np.ndarray, white_level: int) -> np.ndarray:
    """What `decode` gives -> (H, W, 3) uint8 RGB; 16-bit values v become 255 v / white_level, rounded, at most 255."""
    if array.dtype == np.uint16:
        array = cv2.convertScaleAbs(array, alpha=255 / white_level)  # in one pass, without copies in other types
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return array


def read_mask(path: Path, content: BinaryIO | None = None) -> np.ndarray:
    """Decode a ground truth mask to (H, W) uint8, 255 where the defect is; one of 16 bit may hold values of 8.

    `content` is read in place of the file.

    Raises:
        UserError: as `decode`.
    """
    array = decode(path, content)
    return to_rgb(array, FULL_WHITE if array.max() > 255 else 255).max(axis=2)


def decode(path: Path, content: BinaryIO | None = None, max_pixels: float = math.inf) -> np.ndarray:
    """Decode a picture of any mode to (H, W, 3) uint8, or where it has 16 bit to (H, W) or (H, W, 3) uint16.

    A palette becomes its colours, alpha is dropped. What EXIF says of its orientation is followed.

    Args:
        path: the file; errors name it.
        content: what to read in its place, an upload for example.
        max_pixels: a picture that says it has more is refused before it is decoded.

    Raises:
        UserError: missing, truncated, not a picture, more pixels than `max_pixels` or than Pillow takes for a
            decompression bomb, or a bomb of another kind (see `deploy.common.bombs`).
    """
    try:
        with contextlib.nullcontext(content) if content else regular_file(path).open("rb") as file:
            check_structure(file, max_pixels)
        with Image.open(content or path, formats=FORMATS) as image:  # by its name, so that bitmaps are mapped
            check_size(image, max_pixels)
            if not image.mode.startswith("I") and ";16" in str(image.tile[:1]):
                return _decode_deep_colour(path, content, image)
            ImageOps.exif_transpose(image, in_place=True)  # as the camera was held
            return _as_array(image, path)
    except UserError:
        raise
    except Bomb as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged files make Pillow raise many kinds: OSError, SyntaxError, TypeError
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a picture, or damaged" if unknown else str(error) or type(error).__name__  # MemoryError says none
        raise UserError(f"{path}: cannot be read as a picture ({reason})") from error


def _as_array(image: Image.Image, name: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, or (H, W) uint16, of an upright picture; errors name it."""
    if image.mode == "F":
        raise UserError(f"{name}: floating point pictures have no defined white; save it with 8 or 16 bit")
    if not image.mode.startswith("I"):
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy it
    array = np.asarray(image)  # I;16 of 16-bit files, I of 32-bit files
    if array.min() < 0 or array.max() > 65535:
        raise UserError(f"{name}: has pixels beyond 16 bit; save it with 8 or 16 bit")
    return array.astype(np.uint16, copy=False)


def _decode_deep_colour(path: Path, content: BinaryIO | None, image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint16 RGB of a file with 16 bit a colour, opened as `image`; Pillow would drop the lower 8 of them."""
    image.load()  # fails where the file is damaged; OpenCV would fill the rest with something
    if content:
        content.seek(0)
    data = content.read() if content else path.read_bytes()
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # as stored: BGR(A), not turned
    if array is None or array.dtype != np.uint16 or array.ndim != 3:
        raise ValueError("16 bit a colour, in a form that OpenCV does not read; save it as PNG")
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    array = array[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    return np.ascontiguousarray(array[..., 2::-1])


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture file, turned as EXIF says; its pixels are not read.

    Raises:
        UserError: it is none.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception as error:  # as in `decode`
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    return (width, height) if turned else (height, width)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 -> the same with height and width, bilinear."""
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def normalise(pictures: np.ndarray, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32: to [0, 1], minus the mean, over the deviation."""
    scaled = pictures.astype(np.float32) / 255.0
    return np.ascontiguousarray(((scaled - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2))


def preprocess(
    picture: np.ndarray, height: int, width: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (1, 3, height, width) float32, what the model takes."""
    return normalise(resize(picture, height, width)[None], mean, std)


def label(score: float, threshold: float) -> str:
    """`Anomaly` above the threshold, else `Normal`."""
    return "Anomaly" if score > threshold else "Normal"


def describe_thresholds(image: float, rule: str, pixel: float, pixel_rule: str) -> str:
    """Both thresholds with the rule that gave each, for example `image 0.712 (f1), pixel 0.800 (published)`."""
    return f"image {image:.3f} ({rule}), pixel {pixel:.3f} ({pixel_rule})"


def decision_line(score: float, threshold: float, path: Path | None = None) -> str:
    """The published result line, for example `Normal - score:  0.614`; after the path of one of several pictures."""
    prefix = "" if path is None else f"{escaped(str(path))}  "
    return f"{prefix}{label(score, threshold)} - score:  {score:.3f}"


def drawn_size(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> a picture as large as the panels of `draw_result`, which makes the same of it.

    A panel is between 256 and 768 pixels high, lower if it would be wider than 4096.
    """
    height, width = picture.shape[:2]
    factor = min(np.clip(height, 256, 768) / height, 4096 / width)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def heat_colours(scores: np.ndarray, pixel_threshold: float) -> np.ndarray:
    """Colours of the heat map, in every figure and on the service's page: OpenCV's plasma.

    It grows brighter all along, so that the colour-blind and grey prints can read it. It starts at the pixel threshold
    and ends at a score of 1. What is not above the threshold is transparent: its colour is not to be used.

    Args:
        scores: (H, W) float, of the smoothed map.
        pixel_threshold: any number; nothing is above one of 1 or more.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    positions = np.clip((scores - pixel_threshold) / max(1 - pixel_threshold, 1e-6), 0, 1)
    colours = cv2.applyColorMap(np.uint8(np.rint(255 * positions)), cv2.COLORMAP_PLASMA)
    return cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)


def draw_panels(
    picture: np.ndarray,
    anomaly_map: np.ndarray,
    pixel_threshold: float,
    true_mask: np.ndarray | None = None,
    boxes: Sequence[Sequence[float]] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The panels of `draw_result`, which says what they are and takes the same: (h, w, 3) uint8 RGB each."""
    picture = drawn_size(picture)
    size = picture.shape[1::-1]
    scores = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    marked = np.uint8(scores > pixel_threshold)

    def area(colours: np.ndarray, opacity: float) -> np.ndarray:
        return cv2.copyTo(cv2.addWeighted(picture, 1 - opacity, colours, opacity, 0), marked, picture.copy())

    heat = area(heat_colours(scores, pixel_threshold), 0.6)
    outlined = area(np.full_like(picture, MARKED), 0.3)
    line = max(1, min(size) // 256)
    _outline(outlined, marked, MARKED, line)
    if true_mask is not None:
        true = cv2.resize(np.uint8(true_mask), size, interpolation=cv2.INTER_NEAREST)
        _outline(outlined, true, (0, 0, 0), 3 * line)  # a rim, so that it shows on bright pictures too
        _outline(outlined, true, TRUE, line)
    if len(boxes) <= MOST_BOXES:
        for number, box in enumerate(boxes, start=1):
            _number(outlined, str(number), np.array(box) * (*size, *size), line)
    return picture, heat, outlined


def draw_result(
    picture: np.ndarray,
    anomaly_map: np.ndarray,
    score: float,
    image_threshold: float,
    pixel_threshold: float,
    true_mask: np.ndarray | None = None,
    boxes: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """A caption and three panels: the picture, the heat map over it, the area above the pixel threshold.

    The panels have titles, the heat map has its colour bar, the area's outlines have a legend. They are side by side;
    one above the other where the picture is more than twice as wide as high. Texts grow with the panels and shrink to
    the width there is.

    Args:
        picture: (H, W, 3) uint8 RGB.
        anomaly_map: (h, w) float, the smoothed map in [0, 1].
        score: image score in [0, 1].
        image_threshold: the picture is called an anomaly above it.
        pixel_threshold: a pixel is marked, and has a colour in the heat map (see `heat_colours`), above it.
        true_mask: (h, w) bool, where the defect is, if that is known; it is outlined beside what is marked.
        boxes: x, y, width and height of regions, in shares of the picture's width and height. They are drawn around
            what is marked, numbered from 1; not where they are more than `MOST_BOXES`, which nobody could read.

    Returns:
        (height, width, 3) uint8 RGB; the panels are as large as `drawn_size` makes the picture.
    """
    panels = draw_panels(picture, anomaly_map, pixel_threshold, true_mask, boxes)
    height, width = panels[0].shape[:2]
    stacked = width > 2 * height
    line = max(24, height // 20, width // 60 if stacked else width // 20)  # height of a line of text
    column = max(width + line // 2, 10 * line)

    levels = image_threshold, pixel_threshold
    image_level, pixel_level = (f"{round(level, 3) + 0.0:.3f}" for level in levels)  # never -0.000
    outlines = {f"above {pixel_level}": MARKED}
    if true_mask is not None and true_mask.any():
        outlines["true mask"] = TRUE
    feet = (
        np.full((line, column, 3), 255, np.uint8),
        _colour_bar(pixel_threshold, pixel_level, line, column),
        _legend(outlines, line, column),
    )
    cells = []
    for title, panel, foot in zip(("picture", "anomaly scores", "marked pixels"), panels, feet, strict=True):
        left = (column - width) // 2
        sides = ((0, 0), (left, column - width - left), (0, 0))
        cells.append(np.concatenate([_text(title, line, column), np.pad(panel, sides, constant_values=255), foot]))
    body = np.concatenate(cells, axis=0 if stacked else 1)
    decision = f"{decision_line(score, image_threshold)} (threshold {image_level}, pixels {pixel_level})"
    return np.concatenate([_text(decision, line, body.shape[1]), body])


def _outline(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    """Draw the outlines of a (H, W) uint8 mask into the picture, this many pixels wide."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, colour, width)


def _number(picture: np.ndarray, number: str, box: np.ndarray, width: int) -> None:
    """Draw a box, x, y, width and height in pixels, with its number above it, or within it at the picture's edge."""
    left, top, right, bottom = (round(float(place)) for place in (*box[:2], *(box[:2] + box[2:])))
    corners = (left - 2 * width, top - 2 * width), (right - 1 + 2 * width, bottom - 1 + 2 * width)  # around the outline
    cv2.rectangle(picture, *corners, (0, 0, 0), 3 * width)  # a rim, so that it shows on bright pictures too
    cv2.rectangle(picture, *corners, (255, 255, 255), width)
    tag = 255 - _text(number, max(14, len(picture) // 24))  # white on black
    above = top - 3 * width - len(tag)
    y = min(above if above >= 0 else top, len(picture) - len(tag))
    x = min(left, picture.shape[1] - tag.shape[1])
    if min(x, y) >= 0:  # else the panel is too small for it
        picture[y : y + len(tag), x : x + tag.shape[1]] = tag


def _text(text: str, height: int, width: int | None = None) -> np.ndarray:
    """(height, width, 3) uint8, black on white: as large as the height lets it be and, if there is one, the width."""
    margin = height // 4
    length = cv2.getTextSize(text, FONT, 1, 1)[0][0]
    scale = height / 40
    if width is None:
        width = round(scale * length) + 2 * margin
    line = np.full((height, width, 3), 255, np.uint8)
    scale = min(scale, (width - 2 * margin) / length)
    cv2.putText(line, text, (margin, round(0.68 * height)), FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return line


def _colour_bar(pixel_threshold: float, level: str, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: the heat map's colours between the scores at their ends."""
    if pixel_threshold >= 1:
        return _text(f"no score is above {level}", height, width)
    low, high = (_text(text, height) for text in (level, f"{1:.3f}"))
    positions = np.linspace(pixel_threshold, 1, max(width - low.shape[1] - high.shape[1], height))
    bar = np.full((height, len(positions), 3), 255, np.uint8)
    bar[height // 4 : -(height // 4)] = heat_colours(positions[None], pixel_threshold)
    return _fitted([low, bar, high], width)


def _legend(outlines: Mapping[str, tuple[int, int, int]], height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: what the outlines of each colour are of."""
    entries = []
    for text, colour in outlines.items():
        sample = np.full((height, height, 3), 255, np.uint8)
        sample[3 * height // 8 : 5 * height // 8, height // 4 :] = colour
        entries += [sample, _text(text, height)]
    return _fitted(entries, width)


def _fitted(pieces: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The pieces (height, w, 3) uint8 from left to right, made smaller if they need more than the width, on white."""
    line = np.full((pieces[0].shape[0], width, 3), 255, np.uint8)
    row = np.concatenate(pieces, axis=1)
    if row.shape[1] > width:
        row = cv2.resize(row, (width, max(1, len(row) * width // row.shape[1])), interpolation=cv2.INTER_AREA)
    line[: len(row), : row.shape[1]] = row
    return line


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the file's suffix, whole.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(path, lambda name: Image.fromarray(picture).save(name, quality=95))


def write_map(path: Path, scores: np.ndarray) -> None:
    """Write (H, W) float in [0, 1] by the file's suffix, whole.

    .png: 16 bit, 0 to 65535 for 0 to 1; .tiff and .npy: float32.

    Raises:
        UserError: it cannot be written.
    """
    scores = scores.astype(np.float32, copy=False)
    if path.suffix == ".npy":
        write_whole(path, lambda name: np.save(name, scores))
    elif path.suffix == ".tiff":
        write_whole(path, lambda name: Image.fromarray(scores).save(name))
    else:
        content = png(scores, 65535)
        write_whole(path, lambda name: Path(name).write_bytes(content))


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write (H, W) bool as a grey 8-bit PNG of 0 and 255, whole.

    Raises:
        UserError: it cannot be written.
    """
    content = png(mask, 255)
    write_whole(path, lambda name: Path(name).write_bytes(content))


def png(scores: np.ndarray, white: int) -> bytes:
    """(H, W) float in [0, 1], or bool -> grey PNG with 0 to `white` for 0 to 1, of 16 bit where that is above 255."""
    values = np.clip(scores, 0, 1, dtype=np.float32)
    values *= white
    grey = np.rint(values, out=values).astype(np.uint8 if white <= 255 else np.uint16)
    return cv2.imencode(".png", grey)[1].tobytes()
