"""What an upload costs the service at most, by format, at the default limits: python -m benchmarks.uploads

Makes the dearest picture files that the limits let pass, and the smallest of those that would cost most if they passed.
A process of the service decodes each; what it takes beyond a picture of one pixel counts.
"""

import argparse
import io
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from PIL import Image

from deploy.common import bombs
from deploy.common.cli import ArgumentParser, run_main
from deploy.service.decoding import command
from deploy.service.uploads import Limits

SIDE = 5600  # of a square picture just below the most pixels
Tags = Mapping[int, tuple[int, ...]]


def saved(image: Image.Image, file_format: str, turned: bool = False, **options: object) -> bytes:
    """The picture as a file; `turned`: EXIF says that it lies on its side."""
    file = io.BytesIO()
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    image.save(file, file_format, exif=exif, **options)
    return file.getvalue()


def jpeg_of_scans(scans: int, side: int, mode: str = "L") -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    whole = saved(Image.new(mode, (side, side)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - whole.count(b"\xff\xda")) + whole[-2:]


def segment(length: int) -> bytes:
    """EXIF of a JPEG; Pillow adds what follows to what it has."""
    return b"\xff\xe1" + struct.pack(">H", 8 + length) + b"Exif\0\0" + bytes(length)


def jpeg_of_segments(segment: bytes, count: int) -> bytes:
    """A small JPEG that begins with the same segment again and again."""
    whole = saved(Image.new("L", (64, 64)), "JPEG")
    return whole[:2] + segment * count + whole[2:]


def png_of_chunks(chunk: bytes, count: int, image: Image.Image) -> bytes:
    """The picture as PNG with so many such chunks before its pixels."""
    whole = saved(image, "PNG", compress_level=9)
    return whole[:33] + chunk * count + whole[33:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bmp_of_runs(width: int, height: int, runs: bytes) -> bytes:
    """A run-length coded bitmap of 8 bits."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + header + bytes(1024) + runs


def tiff(tags: Tags, data: bytes, order: str = "<", big: bool = False) -> bytes:
    """A TIFF, or BigTIFF, with such tags and `data`, which stands at byte 16."""
    number, entry, small = ("Q", "HHQ", 8) if big else ("L", "HHL", 4)
    blob, entries = bytearray(data), b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}L", *values)
        where = packed.ljust(small, b"\0")
        if len(packed) > small:
            where = struct.pack(order + number, 16 + len(blob))
            blob += packed
        entries += struct.pack(order + entry, tag, 4, len(values)) + where
    mark = b"II" if order == "<" else b"MM"
    start = (
        struct.pack(order + "HHHQ", 43, 8, 0, 16 + len(blob)) if big else struct.pack(order + "HL", 42, 16 + len(blob))
    )
    directory = struct.pack(order + ("Q" if big else "H"), len(tags)) + entries + bytes(small)
    return (mark + start).ljust(16, b"\0") + blob + directory


def grey_tiff(width: int, height: int, compression: int, tags: Tags, data: bytes, **kind: object) -> bytes:
    """A TIFF of 8 bits; `tags` say how its pixels are cut."""
    common = {256: (width,), 257: (height,), 258: (8,), 259: (compression,), 262: (1,), 277: (1,)}
    return tiff({**common, **tags}, data, **kind)


def tiff_of_tile(side: int, width: int = 64, height: int = 64, **kind: object) -> bytes:
    """One deflated tile of this side, however small the picture."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    return grey_tiff(width, height, 8, {322: (side,), 323: (side,), 324: (16,), 325: (len(data),)}, data, **kind)


def tiff_of_strips(count: int) -> bytes:
    """Plain strips of one row, all of the same bytes but for the first, so that Pillow takes each by itself."""
    tags = {273: tuple(16 + row % 2 for row in range(count)), 278: (1,), 279: (8,) * count}
    return grey_tiff(8, count, 1, tags, bytes(16))


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a WebP."""
    return kind + struct.pack("<L", len(data)) + data + bytes(len(data) % 2)


def webp(chunks: bytes) -> bytes:
    """A WebP of these chunks."""
    return webp_chunk(b"RIFF", b"WEBP" + chunks)


def webp_canvas(width: int, height: int) -> bytes:
    """The chunk that says the size of a WebP with metadata."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", b"\4\0\0\0" + sides)


def webp_of_codes(side: int) -> bytes:
    """A lossless WebP in which each of side x side blocks of 4x4 pixels has codes of its own, of one colour each."""

    def bits(value: int, count: int) -> str:  # the lowest first
        return f"{value:0{count}b}"[::-1]

    one = "1000"  # a code of one symbol
    eight = "0" + bits(8, 4) + "000100" + "000" * 9 + "100" + "0" + "0" * 256  # of 256 symbols, a byte each
    start = bits(0x2F, 8) + bits(4 * side - 1, 14) * 2 + "000000" + "1000"  # neither alpha, transforms nor a cache
    numbers = "".join(f"{block & 255:08b}{block >> 8:08b}" for block in range(side**2))  # green and red of a picture
    whole = start + "0" + eight + "1" + bits(13, 7) + eight + one * 3 + numbers + one * 5 * side**2
    return webp(webp_chunk(b"VP8L", int(whole[::-1], 2).to_bytes(-(-len(whole) // 8), "little")))


def dearest(limits: Limits) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """What is in the file, and how to make it."""
    noise = Image.effect_noise((SIDE, SIDE), 50)
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**20), 9))
    plain = int((limits.upload_bytes / 3.1) ** 0.5)  # the side of a picture that just fits uncompressed
    yield "JPEG", lambda: saved(noise, "JPEG", turned=True, quality=45)
    yield "JPEG, CMYK", lambda: saved(Image.new("CMYK", (SIDE, SIDE)), "JPEG", turned=True)
    yield f"JPEG, progressive, {bombs.MOST_LARGE_SCANS} scans", lambda: jpeg_of_scans(20, SIDE, "RGB")
    yield f"JPEG, {bombs.MOST_PARTS} segments", lambda: jpeg_of_segments(segment(10_000), 990)
    yield "PNG, 8 bit", lambda: saved(Image.new("RGB", (SIDE, SIDE)), "PNG", turned=True)
    yield "PNG, 8 bit, transparent", lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "PNG", turned=True)
    yield "PNG, 16 bit", lambda: saved(Image.new("I;16", (SIDE, SIDE)), "PNG", turned=True)
    yield f"PNG, {bombs.MOST_PARTS} profiles", lambda: png_of_chunks(profile, 990, Image.new("RGB", (SIDE, SIDE)))
    yield "BMP", lambda: saved(Image.new("RGB", (plain, plain)), "BMP")
    yield "BMP, run-length coded", lambda: bmp_of_runs(2000, 2000, b"\1\0\0\0" * 2000)
    yield "TIFF", lambda: saved(Image.new("RGB", (plain, plain)), "TIFF", turned=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "lzma"):
        yield (
            f"TIFF, {compression}",
            lambda c=compression: saved(Image.new("RGB", (SIDE, SIDE)), "TIFF", turned=True, compression=c),
        )
    yield (
        "TIFF, 32 bit, deflated",
        lambda: saved(Image.new("I", (SIDE, SIDE)), "TIFF", turned=True, compression="tiff_adobe_deflate"),
    )
    yield "TIFF, one tile", lambda: tiff_of_tile(SIDE)
    yield f"TIFF, {bombs.MOST_TILES} strips", lambda: tiff_of_strips(bombs.MOST_TILES)
    yield "WebP", lambda: saved(noise, "WEBP", turned=True, quality=5, method=0)
    yield "WebP, transparent", lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "WEBP", turned=True, method=0)
    yield "WebP, lossless", lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "WEBP", turned=True, lossless=True)
    yield "WebP, 65536 codes", lambda: webp_of_codes(256)
    metadata = webp_chunk(b"XMP ", b'tiff:Orientation="6"' * 510_000)
    yield "WebP, metadata", lambda: webp(webp_canvas(4, 4) + webp_of_codes(1)[12:] + metadata)
    yield "refused: WebP, 300000 pictures", lambda: webp(webp_chunk(b"ANMF", bytes(24)) * 300_000)
    yield "refused: WebP, 16383x16383", lambda: webp(webp_canvas(16383, 16383) + webp_of_codes(1)[12:])
    yield "refused: JPEG, 4000 scans", lambda: jpeg_of_scans(4000, SIDE)
    yield "refused: JPEG, EXIF in 500000 pieces", lambda: jpeg_of_segments(segment(1), 500_000)
    yield "refused: BMP, run-length coded", lambda: bmp_of_runs(SIDE, SIDE, b"\1\0\0\0" * SIDE)
    yield "refused: PNG, 7000 profiles", lambda: png_of_chunks(profile, 7000, Image.new("L", (64, 64)))
    yield "refused: TIFF, one tile of 26752x26752", lambda: tiff_of_tile(26752)
    yield "refused: TIFF, 1000000 strips", lambda: tiff_of_strips(1_000_000)


def cost(content: bytes, limits: Limits) -> tuple[str, float, float]:
    """What a decoder says of the file, the seconds of CPU time and the megabytes that its process has taken by then."""
    request = {"bytes": len(content), "input_size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "white_level": None}
    with subprocess.Popen(command(limits), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as decoder:
        decoder.stdin.write(json.dumps(request).encode() + b"\n" + content)
        decoder.stdin.flush()
        answer = json.loads(decoder.stdout.readline() or '{"error": "no answer"}')
        process = Path("/proc", str(decoder.pid))
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        kilobytes = int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1])
        decoder.stdin.close()
        decoder.stdout.read()
    return answer.get("error", "decoded"), seconds, kilobytes / 1024


def parse_args() -> argparse.Namespace:
    return ArgumentParser(
        prog="python -m benchmarks.uploads", description="What an upload costs the service at most, by format."
    ).parse_args()


def main() -> None:
    parse_args()
    limits = Limits()
    _, seconds_alone, memory_alone = cost(saved(Image.new("L", (1, 1)), "PNG"), limits)
    print("| picture | file (MB) | CPU time (s) | memory (MB) | |")
    print("| --- | --- | --- | --- | --- |")
    for name, make in dearest(limits):
        content = make()
        said, seconds, memory = cost(content, limits)
        figures = f"{len(content) / 2**20:.1f} | {seconds - seconds_alone:.1f} | {memory - memory_alone:.0f}"
        print(f"| {name} | {figures} | {said} |", flush=True)


if __name__ == "__main__":
    run_main(main)
