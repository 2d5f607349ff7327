"""Pictures in, pictures out: reading, preprocessing, drawing. Arrays only, no framework."""

import contextlib
import glob
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deploy.common.bombs import Bomb, check_size, check_structure
from deploy.common.cli import UserError, escaped
from deploy.common.files import regular_file, write_whole

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # what is inside decides; nothing that starts another program
# Of ImageNet, RGB, for pictures in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PUBLISHED_THRESHOLD = 0.8  # of image and pixel scores
PUBLISHED_RULE = "published"  # which says so


def list_images(path: str | Path) -> list[Path]:
    """Files, sorted: a file itself, the pictures of a folder (not of its subfolders) or what a glob pattern matches.

    Files that are named, by a pattern too, are taken at their word: reading one that is no picture says so.

    Raises:
        UserError: nothing there.
    """
    path = str(path)
    try:
        if path and Path(path).is_dir():
            found = [file for file in Path(path).iterdir() if is_image(file)]
            if not found:
                raise UserError(f"{path}: no picture in this folder ({' '.join(SUFFIXES)})")
        elif path and Path(path).exists():
            return [Path(path)]
        else:
            found = [file for file in _matches(path) if not file.is_dir()]
    except OSError as error:  # a name too long, a folder that may not be read
        raise UserError(f"{path}: cannot be looked at ({error.strerror})") from error
    if not found:
        raise UserError(f"{path or 'empty path'}: no such file, folder or pattern with pictures")
    return sorted(found)


def _matches(pattern: str) -> set[Path]:
    """What `glob.glob(pattern, recursive=True)` finds, but `**` enters no link: two in circles would take for ever."""
    separators = re.escape(os.sep + (os.altsep or ""))  # Windows has two
    head, *tails = re.split(rf"(?:^|(?<=[{separators}]))\*\*(?:[{separators}]|$)", pattern, maxsplit=1)
    if not tails:
        return {Path(name) for name in glob.glob(pattern)}
    found = set()
    for top in glob.glob(head) if head else ["."]:
        for folder, below, _ in os.walk(top):
            below[:] = [name for name in below if not name.startswith(".")]
            found |= _matches(os.path.join(glob.escape(folder), tails[0] or "*"))
    return found


def drawing_paths(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where to write the drawing of each picture: `folder`, the subfolders in which the pictures differ, name.jpg.

    Raises:
        UserError: beside several pictures; who asks for all of their folder again would get the drawings scored.
    """
    top = os.path.commonpath([path.parent for path in images])
    drawings = {path: folder / f"{path.relative_to(top)}.jpg" for path in images}
    beside = {path.parent.resolve() for path in images} & {path.parent.resolve() for path in drawings.values()}
    if len(images) > 1 and beside:
        raise UserError(f"{beside.pop()}: holds the pictures; their drawings must go to another folder, or move them")
    return drawings


def is_image(path: Path) -> bool:
    """Whether this is a file whose name ends like a picture's, in any case; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_rgb(path: Path, content: BinaryIO | None = None, max_pixels: float = math.inf) -> np.ndarray:
    """Decode a picture of any mode to (H, W, 3) uint8 RGB.

    Grey becomes three equal channels, a palette its colours, 16 bit is scaled to 8, alpha is dropped. What EXIF says
    of its orientation is followed.

    Args:
        path: the file; errors name it.
        content: what to read in its place, an upload for example.
        max_pixels: a picture that says it has more is refused before it is decoded.

    Raises:
        UserError: missing, truncated, not a picture, more pixels than `max_pixels` or than Pillow takes for a
            decompression bomb, or a bomb of another kind (see `deploy.common.bombs`).
    """
    array = _decode(path, content, max_pixels)
    if array.dtype == np.uint16:
        array = cv2.convertScaleAbs(array, alpha=1 / 257)  # rounds; in one pass, without copies in other types
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return array


def read_mask(path: Path) -> np.ndarray:
    """Decode a ground truth mask to (H, W) uint8, 255 where the defect is.

    Raises:
        UserError: as `read_rgb`.
    """
    return read_rgb(path).max(axis=2)


def _decode(path: Path, content: BinaryIO | None, max_pixels: float) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W) uint16."""
    try:
        with contextlib.nullcontext(content) if content else regular_file(path).open("rb") as file:
            check_structure(file, max_pixels)
        with Image.open(content or path, formats=FORMATS) as image:  # by its name, so that bitmaps are mapped
            check_size(image, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)  # as the camera was held
            if not image.mode.startswith("I"):
                if image.mode == "F":
                    raise UserError(f"{path}: floating point pictures have no defined white; save it with 8 or 16 bit")
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy it
            array = np.asarray(image)  # I;16 of 16-bit files, I of 32-bit files
    except UserError:
        raise
    except Bomb as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged files make Pillow raise many kinds: OSError, SyntaxError, TypeError
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a picture, or damaged" if unknown else str(error) or type(error).__name__  # MemoryError says none
        raise UserError(f"{path}: cannot be read as a picture ({reason})") from error
    if array.min() < 0 or array.max() > 65535:
        raise UserError(f"{path}: has pixels beyond 16 bit; save it with 8 or 16 bit")
    return array.astype(np.uint16, copy=False)


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


def draw_result(
    picture: np.ndarray, anomaly_map: np.ndarray, score: float, image_threshold: float, pixel_threshold: float
) -> np.ndarray:
    """Three panels side by side: the picture, the heat map over it, the thresholded mask with its outline.

    Args:
        picture: (H, W, 3) uint8 RGB.
        anomaly_map: (h, w) float, the smoothed map in [0, 1]; the colours run from 0 to 1, the same in every figure.
        score: image score in [0, 1].
        image_threshold: the picture is called an anomaly above it.
        pixel_threshold: a pixel belongs to the mask above it.

    Returns:
        (panel height + caption, 3 * panel width, 3) uint8 RGB; see `drawn_size`.
    """
    picture = drawn_size(picture)
    size = picture.shape[1::-1]
    scores = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)

    heat = cv2.applyColorMap(np.uint8(np.clip(scores, 0, 1) * 255), cv2.COLORMAP_JET)
    heat = cv2.addWeighted(picture, 0.5, cv2.cvtColor(heat, cv2.COLOR_BGR2RGB), 0.5, 0)

    mask = np.uint8(scores > pixel_threshold)
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    outlined = np.where(mask[..., None] > 0, picture // 2 + np.uint8([127, 0, 0]), picture)
    outlined = cv2.drawContours(np.ascontiguousarray(outlined), outlines, -1, (255, 0, 0), max(1, size[1] // 256))

    panels = np.concatenate([picture, heat, outlined], axis=1)
    caption = np.full((40, panels.shape[1], 3), 255, np.uint8)
    text = f"{decision_line(score, image_threshold)} (threshold {image_threshold:g}, pixels {pixel_threshold:g})"
    scale = min(0.6, panels.shape[1] / 800)
    cv2.putText(caption, text, (8, 26), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([caption, panels], axis=0)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the file's suffix, whole.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(path, lambda name: Image.fromarray(picture).save(name, quality=95))
