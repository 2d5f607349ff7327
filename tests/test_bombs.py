"""Picture files that were made to cost minutes or gigabytes, and thousands of damaged ones: a picture or one line."""

import io
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.uploads import (
    bmp_of_runs,
    cost,
    grey_tiff,
    jpeg_of_scans,
    jpeg_of_segments,
    png_chunk,
    png_of_chunks,
    saved,
    segment,
    tiff_of_strips,
    tiff_of_tile,
    webp,
    webp_canvas,
    webp_chunk,
    webp_of_codes,
)
from deploy.common.bombs import MOST_PARTS, MOST_SCANS, MOST_TILES
from deploy.common.cli import UserError
from deploy.common.imaging import read_rgb
from deploy.service.uploads import Limits
from tests.serving import picture_file

MB = 2**20
SMALL = Image.new("L", (64, 64), 7)
PROFILE = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(MB), 9))


def read(content, **options):
    return read_rgb(Path("picture"), io.BytesIO(content), **options)


def refused(content, words, **options):
    """Reading must end in one line with the words, and with little work."""
    begun = time.process_time()
    with pytest.raises(UserError, match=words) as error:
        read(content, **options)
    assert time.process_time() - begun < 1
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


# ---- JPEG


def test_a_jpeg_of_thousands_of_scans_is_refused_and_one_of_ten_is_read():
    refused(jpeg_of_scans(4000, 5600), "scans", max_pixels=32_000_000)
    assert read(jpeg_of_scans(10, 5600), max_pixels=32_000_000).shape == (5600, 5600, 3)


def test_a_hundred_scans_are_allowed_and_of_the_largest_pictures_twenty():
    assert read(jpeg_of_scans(MOST_SCANS, 64)).shape == (64, 64, 3)
    refused(jpeg_of_scans(MOST_SCANS + 1, 64), "101 scans")
    assert read(jpeg_of_scans(20, 64), max_pixels=64**2).shape == (64, 64, 3)
    refused(jpeg_of_scans(21, 64), "21 scans", max_pixels=64**2)


def test_what_looks_like_scans_in_thumbnails_and_behind_the_picture_does_not_count():
    thumbnails = b"\xff\xda\xff\xd9" * 1000
    whole = jpeg_of_segments(b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnails)) + thumbnails, 3)
    motion = np.random.default_rng(0).bytes(12 * MB)  # as phones put a film behind their pictures
    assert motion.count(b"\xff\xda") > MOST_SCANS
    assert (read(whole + motion) == read(saved(Image.new("L", (64, 64)), "JPEG"))).all()


def test_scans_behind_a_segment_that_only_looks_like_the_end_count():
    whole = jpeg_of_scans(MOST_SCANS + 1, 64)
    place = whole.rindex(b"\xff\xda")
    refused(whole[:place] + b"\xff\xfe\x00\x04\xff\xd9" + whole[place:], "scans")


def test_a_jpeg_with_more_than_a_thousand_segments_or_much_between_them_is_refused():
    assert read(jpeg_of_segments(segment(3000), MOST_PARTS - 100)).shape == (64, 64, 3)
    for many in (segment(1), b"\xff\xc4\x00\x02", b"\xff\xe5\x00\x02", b"\xff\xd0", b"\xff"):
        refused(jpeg_of_segments(many, 500_000), "beside its pixels")


# ---- PNG and BMP


def test_a_png_with_more_than_a_thousand_chunks_beside_its_pixels_is_refused():
    assert read(png_of_chunks(PROFILE, 100, SMALL)).shape == (64, 64, 3)
    refused(png_of_chunks(PROFILE, MOST_PARTS, SMALL), "beside its pixels")
    behind = saved(SMALL, "PNG")
    refused(behind[:-12] + png_chunk(b"tEXt", b"a\0") * MOST_PARTS + behind[-12:], "beside its pixels")


def test_the_chunks_of_pixels_may_be_as_many_as_they_are():
    whole = saved(Image.effect_noise((64, 64), 50), "PNG")
    start, length = whole.index(b"IDAT") - 4, int.from_bytes(whole[whole.index(b"IDAT") - 4 :][:4], "big")
    pixels = whole[start + 8 : start + 8 + length]
    cut = b"".join(png_chunk(b"IDAT", pixels[i : i + 1]) for i in range(len(pixels)))
    assert len(pixels) > MOST_PARTS
    assert (read(whole[:start] + cut + whole[start + length + 12 :]) == read(whole)).all()


def test_a_bitmap_of_runs_may_have_an_eighth_of_the_pixels():
    runs = b"\x40\x07" + b"\0\0"
    assert (read(bmp_of_runs(64, 64, runs * 64), max_pixels=8 * 64**2) == 0).all()  # colour 7 of a black palette
    refused(bmp_of_runs(64, 64, runs * 64), "64x64 of runs", max_pixels=8 * 64**2 - 1)
    refused(bmp_of_runs(5600, 5600, b"\1\0\0\0" * 5600), "of runs", max_pixels=32_000_000)


# ---- TIFF


@pytest.mark.parametrize("kind", [{"order": "<"}, {"order": ">"}, {"order": "<", "big": True}])
def test_a_tile_obeys_max_pixels_too(kind):
    assert read(tiff_of_tile(80, **kind), max_pixels=80**2).shape == (64, 64, 3)
    refused(tiff_of_tile(80, **kind), "80x80 in a tile is more than the 6399 pixels", max_pixels=80**2 - 1)


def test_where_there_is_no_other_limit_that_of_pillow_holds_for_tiles(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64**2)
    assert read(tiff_of_tile(90)).shape == (64, 64, 3)
    refused(tiff_of_tile(91), "91x91 in a tile is more than the 8192 pixels")


def test_a_tile_whose_side_is_a_fraction_is_refused():
    whole = grey_tiff(64, 64, 8, {322: (80,), 323: (80,), 324: (16,), 325: (99,)}, b"\1" * 99)
    refused(whole.replace(struct.pack("<HH", 322, 4), struct.pack("<HH", 322, 5)), "tiles have no size")


def test_a_strip_takes_no_more_than_the_picture_whatever_its_tag_says():
    for rows in (64, 400_000_000, 2**32 - 1):  # the last is what many programs write
        data = zlib.compress(bytes(64 * 64))
        content = grey_tiff(64, 64, 8, {273: (16,), 278: (rows,), 279: (len(data),)}, data)
        before = peak_memory(reset=True)
        assert read(content, max_pixels=64**2).shape == (64, 64, 3)
        assert peak_memory() - before < 10


def test_a_tiff_in_a_million_strips_is_refused():
    assert read(tiff_of_strips(1000)).shape == (1000, 8, 3)
    refused(tiff_of_strips(1_000_000), "strips")
    refused(grey_tiff(64, 64, 8, {273: (16,) * (MOST_TILES + 1)}, b"", order=">"), "strips")
    refused(grey_tiff(64, 64, 8, {324: (16,) * (MOST_TILES + 1)}, b"", big=True), "tiles")


# ---- WebP


def test_honest_webp_files_are_read():
    picture = Image.effect_noise((40, 30), 50).convert("RGBA")
    for options in ({}, {"lossless": True}, {"icc_profile": bytes(3001)}, {"xmp": b"<x/>"}):
        for mode in ("RGB", "RGBA"):
            assert read(saved(picture.convert(mode), "WEBP", **options)).shape == (30, 40, 3)
    assert read(saved(picture, "WEBP", turned=True)).shape == (40, 30, 3)
    whole = saved(picture, "WEBP", lossless=True)
    assert (read(whole) == np.asarray(picture.convert("RGB"))).all()
    assert (read(whole + bytes(100_000)) == read(whole)).all()  # what follows its end is not part of it


def test_a_webp_may_have_codes_for_each_block():
    before = peak_memory(reset=True)
    assert (read(webp_of_codes(64)) == 0).all()
    assert peak_memory() - before < 60  # of 4096; the most are 65536


def test_an_animated_webp_is_refused_however_many_frames_it_has():
    for frames in (2, 3):
        pictures = [Image.new("RGB", (8, 8), (40 * i,) * 3) for i in range(frames)]
        refused(saved(pictures[0], "WEBP", save_all=True, append_images=pictures[1:]), "animated WebP")
    refused(webp(webp_canvas(1, 1) + webp_chunk(b"ANMF", bytes(24)) * 300_000), "animated WebP")


def test_a_webp_with_more_than_a_thousand_chunks_is_refused():
    pixels = picture_file(0, (64, 64), "WEBP")[12:]
    extended = webp_canvas(64, 64) + pixels
    assert read(webp(extended + webp_chunk(b"JUNK", b"odd") * (MOST_PARTS - 2))).shape == (64, 64, 3)
    refused(webp(extended + webp_chunk(b"JUNK", b"odd") * (MOST_PARTS - 1)), "beside its pixels")


@pytest.mark.parametrize(
    "start",
    [
        picture_file(0, (300, 200), "WEBP"),
        picture_file(0, (300, 200), "WEBP", lossless=True),
        picture_file(0, (300, 200), "WEBP", icc_profile=b"profile"),
        webp(webp_canvas(300, 200)),
    ],
)
def test_the_size_of_a_webp_is_known_before_it_is_opened(start):
    refused(start, "300x200 is more than the 59999 pixels", max_pixels=59_999)


def test_a_webp_that_says_it_is_sixteen_million_pixels_wide_is_refused():
    refused(webp(webp_canvas(2**24, 2**24)), "16777216x16777216 is more than")


def test_what_only_begins_like_a_webp_is_no_picture():
    for content in (b"RIFF", b"RIFF\4\0\0\0WEBP", b"RIFF\4\0\0\0WAVE", webp(b"VP8 "), webp(b"VP8X\1\0\0\0")):
        refused(content, "cannot be read as a picture")


# ---- all of them, damaged


def originals():
    """Small files of many kinds."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (40, 48), np.uint16))
    grey, palette = colours.convert("L"), colours.quantize(16)
    yield saved(colours, "JPEG", turned=True)
    yield saved(colours, "JPEG", progressive=True)
    yield saved(colours.convert("CMYK"), "JPEG", quality=30)
    for image in (colours, grey, palette, grey16, colours.convert("RGBA")):
        yield saved(image, "PNG")
    yield png_of_chunks(png_chunk(b"tEXt", b"a\0b"), 3, grey)
    for image in (colours, grey, palette, grey.convert("1")):
        yield saved(image, "BMP")
    yield bmp_of_runs(48, 40, b"\x20\x07\0\3abc\0\0\2\1\0\2\1\1" * 30 + b"\0\1")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield saved(colours, "TIFF", compression=compression)
    yield saved(grey16, "TIFF", turned=True)
    yield saved(grey.convert("1"), "TIFF", compression="group4")
    yield saved(colours, "TIFF", big_tiff=True)
    yield tiff_of_tile(64, order=">")
    yield tiff_of_tile(64, big=True)
    yield tiff_of_strips(40)
    yield saved(colours, "WEBP", turned=True)
    yield saved(colours.convert("RGBA"), "WEBP", quality=30)
    yield saved(colours, "WEBP", lossless=True)
    yield saved(colours, "WEBP", save_all=True, append_images=[colours.rotate(90)])


def damaged(rng, content):
    """The bytes with some of them changed: single ones, numbers of the largest kind, pieces lost, doubled, moved."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        # Where the structure is: most often at the start, for TIFF at the end too.
        reach = rng.choice([64, 400, len(content)])
        place = int(rng.integers(0, min(reach, len(content)) or 1))
        if rng.random() < 0.2:
            place = max(len(content) - 1 - place, 0)
        length = int(rng.integers(1, 33))
        piece = content[place : place + length]
        match rng.integers(6):
            case 0 | 1:
                content[place : place + 1] = rng.bytes(1)
            case 2:
                number = [0, 1, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1][rng.integers(7)]
                content[place : place + 4] = number.to_bytes(4, ["big", "little"][rng.integers(2)])
            case 3:
                del content[place : place + length]
            case 4:
                content[place:place] = piece * int(rng.integers(1, 50))
            case 5:
                other = int(rng.integers(0, len(content) or 1))
                content[other : other + length] = piece
    return bytes(content)


def peak_memory(reset=False):
    """The most megabytes that this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.filterwarnings("ignore")  # Pillow's, on odd metadata
def test_two_thousand_damaged_files_are_pictures_or_one_line():
    rng = np.random.default_rng(0)
    whole = list(originals())
    before, read_well = peak_memory(reset=True), 0
    for i in range(2000):
        content = damaged(rng, whole[i % len(whole)])
        begun = time.process_time()
        try:
            picture = read(content, max_pixels=1_000_000)
        except UserError as error:
            assert "\n" not in str(error)
            assert str(error).startswith("picture: ")
        else:
            read_well += 1
            assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)
        assert time.process_time() - begun < 1, content
    assert peak_memory() - before < 50
    assert 400 < read_well < 1600  # the damage is neither too light nor too heavy to tell anything


def test_the_benchmark_measures_what_a_file_costs():
    said, seconds, memory = cost(jpeg_of_scans(20, 2000), Limits())
    assert said == "decoded"
    assert 0 < seconds < 10
    assert memory > 4 * 2000**2 / MB
    assert cost(tiff_of_tile(26752), Limits())[0].startswith("image: 26752x26752 in a tile")
