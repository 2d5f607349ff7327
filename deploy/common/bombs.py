"""Small picture files that would take minutes or gigabytes to decode: told by their structure, before they are decoded.

What is refused here, no camera and no program writes. What passes is decoded in time that grows with the file and its
pixels only.
"""

import math
import re
import struct
from typing import BinaryIO

from PIL import Image

MOST_SCANS = 100  # of a JPEG; honest ones have 1 to 10, and each goes through all pixels again,
MOST_LARGE_SCANS = 20  # so that of the most pixels allowed there may be fewer
MOST_PARTS = 1000  # JPEG segments, WebP chunks, PNG's other than pixels: each is looked at, and EXIF added to EXIF
MOST_STRAY_BYTES = 100_000  # before the first scan of a JPEG, outside its segments; Pillow reads them one by one
MOST_TILES = 100_000  # or strips, of a TIFF
EOI, SOS = 0xD9, 0xDA  # JPEG markers: end of image, start of scan
SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, which says the size
TILE_WIDTH, TILE_LENGTH, OFFSETS = 322, 323, (273, 324)  # tags of a TIFF; where its strips or tiles are
# Chunks of a WebP that say its size: the first byte of it, bits from width to height, bits of each, what to add.
WEBP_SIZES = {b"VP8 ": (6, 16, 14, 0), b"VP8L": (1, 14, 14, 1), b"VP8X": (4, 24, 24, 1)}
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xef\xfe]")  # those which a length follows, and EOI


class Bomb(Exception):
    """What the file is, and what to do with it if it is honest after all."""


def check_structure(file: BinaryIO, max_pixels: float) -> None:
    """Read the file for what it is made of.

    Raises:
        Bomb: it is one.
    """
    start = file.read(8)
    if start.startswith(b"\xff\xd8\xff"):
        _check_jpeg(start + file.read(), max_pixels)
    elif start == b"\x89PNG\r\n\x1a\n":
        _check_png(file)
    elif start.startswith((b"II", b"MM")):
        _check_tiff(start + file.read(8), file)
    elif start.startswith(b"RIFF") and file.read(4) == b"WEBP":
        _check_webp(8 + int.from_bytes(start[4:], "little"), file, max_pixels)


def _check_jpeg(data: bytes, max_pixels: float) -> None:
    """Go through the segments as libjpeg does; pixels hold no marker, thumbnails within a segment do not count."""
    scans = parts = stray = pixels = 0
    place = 2
    while (found := MARKER.search(data, place)) and (marker := found[0][1]) != EOI:
        length, _, height, width = struct.unpack(">HBHH", data[found.end() : found.end() + 7].ljust(7, b"\0"))
        parts += 1
        if not scans:
            stray += found.start() - place
        if marker in SOF:
            pixels = width * height
        scans += marker == SOS
        if scans > MOST_SCANS or scans * pixels > MOST_LARGE_SCANS * max_pixels:
            raise Bomb(f"a JPEG of {scans} scans or more, each of all its pixels; save it again")
        if parts > MOST_PARTS or stray > MOST_STRAY_BYTES:
            raise Bomb("a JPEG with too much beside its pixels; save it again without metadata")
        place = found.end() + length


def _check_png(file: BinaryIO) -> None:
    """Go from chunk to chunk."""
    parts = 0
    while len(head := file.read(8)) == 8 and not head.endswith(b"IEND"):
        parts += not head.endswith((b"IDAT", b"fdAT", b"fcTL"))  # pixels, of an animation too
        if parts > MOST_PARTS:
            raise Bomb("a PNG with too much beside its pixels; save it again without metadata")
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)


def _check_webp(end: int, file: BinaryIO, max_pixels: float) -> None:
    """Go from chunk to chunk; what stands behind the end that the file has for itself, libwebp leaves alone too.

    To open an animated one costs memory of two of its pictures, and all of its chunks are looked at.
    """
    parts, place = 0, file.tell()
    while place < end and len(head := file.read(18)) >= 8:
        kind, length = struct.unpack("<4sL", head[:8])
        if kind == b"ANMF":
            raise Bomb("an animated WebP; save the picture that is meant by itself")
        parts += 1
        if parts > MOST_PARTS:
            raise Bomb("a WebP with too much beside its pixels; save it again without metadata")
        if kind in WEBP_SIZES:
            first, shift, bits, more = WEBP_SIZES[kind]
            sides = int.from_bytes(head[8 + first :], "little")
            _check_pixels((sides & 2**bits - 1) + more, (sides >> shift & 2**bits - 1) + more, "", _most(max_pixels))
        place = file.seek(place + 8 + length + length % 2)


def _check_tiff(start: bytes, file: BinaryIO) -> None:
    """Look how many strips or tiles there are; Pillow would list them to open the file, a million in two seconds."""
    order, big = "<" if start.startswith(b"II") else ">", start[2] == 43
    (directory,) = struct.unpack(order + "Q", start[8:16]) if big else struct.unpack(order + "L", start[4:8])
    file.seek(directory)
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    (entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    table = file.read(min(entries, 2**16) * entry.size)
    for tag, _, count in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
        if tag in OFFSETS and count > MOST_TILES:
            raise Bomb(f"a TIFF in more than {MOST_TILES} strips or tiles; save it again")


def check_size(image: Image.Image, max_pixels: float) -> None:
    """Compare an opened picture, and the tiles of a TIFF, with the pixels allowed.

    A tile is decoded whole, however small the picture is; where `max_pixels` is infinite, Pillow's own limit holds for
    it. Strips take no more than the picture: libtiff ends them where it ends, whatever their tag says. Run-length coded
    bitmaps may have an eighth of the pixels: Pillow decodes them in Python, ten times as slowly as the others.

    Raises:
        Bomb: they are more.
    """
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    if not all(isinstance(side, int) for side in tile):
        raise Bomb("a TIFF whose tiles have no size; save it again")
    limit = _most(max_pixels)
    runs = any(part[0] == "bmp_rle" for part in image.tile[:1])
    _check_pixels(*image.size, " of runs" if runs else "", limit // 8 if runs else limit)
    _check_pixels(*tile, " in a tile", limit)


def _most(max_pixels: float) -> float:
    return min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or math.inf))


def _check_pixels(width: int, height: int, what: str, most: float) -> None:
    if width * height > most:
        raise Bomb(f"{width}x{height}{what} is more than the {most} pixels allowed; scale it down")
