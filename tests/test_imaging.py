"""Pictures in and out: the result line, lists of files, preprocessing, figures."""

import io
import os
import tracemalloc
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from deploy.common.cli import UserError
from deploy.common.imaging import (
    MARKED,
    MEAN,
    STD,
    TRUE,
    decision_line,
    draw_panels,
    draw_result,
    drawing_paths,
    drawn_size,
    heat_colours,
    list_images,
    normalise,
    preprocess,
    read_rgb,
    resize,
    write_picture,
)


@pytest.mark.parametrize(
    ("score", "threshold", "line"),
    [
        (0.6139, 0.8, "Normal - score:  0.614"),
        (0.95, 0.8, "Anomaly - score:  0.950"),
        (0.8, 0.8, "Normal - score:  0.800"),
        (0.8001, 0.8, "Anomaly - score:  0.800"),
        (0.0, 0.0, "Normal - score:  0.000"),
        (1.0, 0.5, "Anomaly - score:  1.000"),
    ],
)
def test_the_published_result_line(score, threshold, line):
    assert decision_line(score, threshold) == line


def test_the_name_of_a_picture_forges_no_line():
    name = "瓶 1\u3000a  b\u202fc\nNormal - score:  0.100\r\x1b[2J\udcff.png"
    line = decision_line(0.9, 0.8, Path(name))
    escaped = "瓶 1\u3000a  b\u202fc\\nNormal - score:  0.100\\r\\x1b[2J\\udcff.png"
    assert line == f"{escaped}  Anomaly - score:  0.900"
    assert len(line.splitlines()) == 1


# ---- list_images


@pytest.fixture
def pictures(tmp_path):
    """Files of all kinds; none is opened by the functions under test."""
    for name in (
        "b.png",
        "a.JPG",
        "c.Tiff",
        ".hidden.png",
        "note.txt",
        "sub/d.bmp",
        "sub/e.jpeg",
        "sub/g.WebP",
        "[x]/f.tif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", ["a.JPG", "b.png", "c.Tiff"]),
        ("sub/", ["sub/d.bmp", "sub/e.jpeg", "sub/g.WebP"]),
        ("[x]", ["[x]/f.tif"]),
        ("b.png", ["b.png"]),
        ("note.txt", ["note.txt"]),  # a file that is named is taken at its word; reading it says what is wrong
        ("*", ["a.JPG", "b.png", "c.Tiff", "note.txt"]),
        ("n*", ["note.txt"]),
        ("*.png", ["b.png"]),
        ("sub/*.bmp", ["sub/d.bmp"]),
        ("**/*", ["[x]/f.tif", "a.JPG", "b.png", "c.Tiff", "note.txt", "sub/d.bmp", "sub/e.jpeg", "sub/g.WebP"]),
    ],
)
def test_list_images(pictures, path, found):
    assert names(list_images(f"{pictures}/{path}"), pictures) == found


def test_a_folder_of_folders_says_how_to_take_theirs(tmp_path):
    (tmp_path / "good").mkdir()
    with pytest.raises(UserError, match=r"for its subfolders: '.*\*\*/\*\.png'"):
        list_images(tmp_path)


def test_a_pattern_of_windows_may_have_its_own_separators(pictures, monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os, "altsep", "/")
    for pattern in ("/**/*.bmp", "/**\\*.bmp"):
        assert names(list_images(f"{pictures}{pattern}"), pictures) == ["sub/d.bmp"]


@pytest.mark.parametrize("path", ["absent.png", "*.gif", "folder.png", "absent/*.png", "a" * 300])
def test_nothing_there_is_a_user_error_that_names_it(pictures, path):
    with pytest.raises(UserError, match=path[:10].replace("*", r"\*")):
        list_images(pictures / path)


def test_an_empty_path_is_not_the_current_folder(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError):
        list_images("")


def test_several_paths_come_in_their_order_and_each_file_once(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "link").symlink_to("sub")
    absolute = f"{pictures}/sub/../sub/d.bmp"
    given = ["sub", "*.png", "./b.png", "a.JPG", absolute, "link/e.jpeg", "[x]", "note.txt"]
    assert [str(path) for path in list_images(*given)] == [
        *("sub/d.bmp", "sub/e.jpeg", "sub/g.WebP"),
        *("b.png", "a.JPG", "[x]/f.tif", "note.txt"),
    ]
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        list_images("b.png", "absent.png", "a.JPG")


def test_drawings_of_relative_absolute_and_upward_paths_stay_in_their_folder(pictures, monkeypatch):
    monkeypatch.chdir(pictures / "sub")
    images = [Path("d.bmp"), Path("../b.png"), pictures / "[x]/f.tif"]
    assert list(drawing_paths(images, Path("out")).values()) == [
        Path("out/sub/d.bmp.jpg"),
        Path("out/b.png.jpg"),
        Path("out/[x]/f.tif.jpg"),
    ]


def test_drawings_keep_the_subfolders_in_which_the_pictures_differ(pictures, tmp_path):
    images = [pictures / "b.png", pictures / "sub" / "d.bmp"]
    out = tmp_path / "out"
    assert drawing_paths(images, out) == {
        pictures / "b.png": out / "b.png.jpg",
        pictures / "sub" / "d.bmp": out / "sub" / "d.bmp.jpg",
    }


def test_drawings_do_not_go_beside_several_pictures(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    b, d, e = (Path(name) for name in ("b.png", "sub/d.bmp", "sub/e.jpeg"))
    for images, folder in (([d, e], "sub"), ([d, e], pictures / "sub"), ([b, d], "."), ([b, d], "sub/../sub")):
        with pytest.raises(UserError, match="holds the pictures"):
            drawing_paths(images, Path(folder))
    assert drawing_paths([b], Path()) == {b: Path("b.png.jpg")}
    assert drawing_paths([d, e], Path()) == {d: Path("d.bmp.jpg"), e: Path("e.jpeg.jpg")}


def test_no_two_pictures_share_a_drawing(tmp_path):
    images = [tmp_path / name for name in ("a.png", "a.jpg", "x/a.png", "y/a.png")]
    assert len(set(drawing_paths(images, tmp_path / "out").values())) == 4


# ---- reading


def test_an_upload_is_read_like_a_file(tmp_path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "a.png")
    content = io.BytesIO((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(read_rgb(Path("upload"), content), read_rgb(tmp_path / "a.png"))
    with pytest.raises(UserError, match="upload"):
        read_rgb(Path("upload"), io.BytesIO(b"no picture"))


def test_every_16_bit_value_becomes_the_nearest_of_8_bit_without_large_copies(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(np.tile(values, (4, 4))).save(tmp_path / "wide.png")
    tracemalloc.start()
    picture = read_rgb(tmp_path / "wide.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(picture[:256, :256, 0], np.round(values / 257))
    assert peak < 8 * 2**20  # bytes a pixel; numbers of float64 alone take 8


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", max_pixels=20).shape == (4, 5, 3)
    with pytest.raises(UserError, match=r"a\.png: 5x4 is more than the 19 pixels"):
        read_rgb(tmp_path / "a.png", max_pixels=19)


# ---- preprocess


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_photograph_is_turned_as_the_camera_was_held(tmp_path, suffix):
    upright = np.zeros((6, 9, 3), np.uint8)
    upright[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned clockwise
    path = tmp_path / f"phone.{suffix}"
    Image.fromarray(np.rot90(upright).copy()).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_rgb(path), upright)


def test_preprocessing_is_imagenet_normalisation_channels_first():
    picture = np.zeros((4, 4, 3), np.uint8) + np.uint8([255, 128, 0])
    batch = preprocess(picture, 4, 4)
    assert batch.dtype == np.float32
    assert batch.flags["C_CONTIGUOUS"]
    expected = (np.array([1.0, 128 / 255, 0.0]) - MEAN) / STD
    np.testing.assert_allclose(batch, np.broadcast_to(expected[:, None, None], (1, 3, 4, 4)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 5000), (4, 6)])
def test_any_shape_is_resized_to_height_and_width(shape):
    assert preprocess(np.full((*shape, 3), 7, np.uint8), 32, 48).shape == (1, 3, 32, 48)


def test_resize_is_bilinear_along_both_axes():
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[1] = 200  # dark above bright
    expected = np.repeat([[0], [50], [150], [200]], 8, axis=1)
    np.testing.assert_allclose(resize(picture, 4, 8)[..., 0], expected, atol=1)
    np.testing.assert_allclose(resize(picture[..., 0], 4, 8), expected, atol=1)
    np.testing.assert_allclose(
        resize(np.ascontiguousarray(picture.transpose(1, 0, 2)), 8, 4)[..., 2].T, expected, atol=1
    )


def test_normalise_keeps_pictures_and_colours_apart():
    pictures = np.zeros((2, 3, 5, 3), np.uint8)
    pictures[1, 2, 4, 0] = 255
    batch = normalise(pictures)
    assert batch.shape == (2, 3, 3, 5)
    assert batch[1, 0, 2, 4] == pytest.approx((1 - MEAN[0]) / STD[0])
    batch[1, 0, 2, 4] = -MEAN[0] / STD[0]
    np.testing.assert_allclose(batch, np.broadcast_to((-np.divide(MEAN, STD))[:, None, None], batch.shape), rtol=1e-5)


# ---- draw_result


def panels(shape, anomaly_map, pixel_threshold=0.5, true_mask=None):
    """The three of a grey picture."""
    return draw_panels(np.full((*shape, 3), 100, np.uint8), anomaly_map, pixel_threshold, true_mask)


@pytest.fixture
def spot():
    """An anomaly in the upper left quarter of the map."""
    anomaly_map = np.zeros((64, 64))
    anomaly_map[8:24, 8:24] = 1.0
    return anomaly_map


def plasma(position):
    """What matplotlib gives, whose colour map it is."""
    return [round(255 * channel) for channel in matplotlib.colormaps["plasma"](float(position))[:3]]


@pytest.mark.parametrize("threshold", [0.8, 0.0, -0.5])
def test_heat_goes_from_the_pixel_threshold_to_1(threshold):
    scores = np.array([[threshold, (threshold + 1) / 2, 1.0]])
    colours = heat_colours(scores, threshold)
    assert colours.dtype == np.uint8
    for colour, position in zip(colours[0].astype(int), (0, 0.5, 1), strict=True):
        np.testing.assert_allclose(colour, plasma(position), atol=3)


@pytest.mark.parametrize("threshold", [1.0, 1.5, 1 - 1e-9])
def test_heat_has_colours_for_any_threshold(threshold):
    assert heat_colours(np.array([[0.0, 1.0]]), threshold).shape == (1, 2, 3)


def test_the_picture_shows_below_the_threshold_and_through_the_heat(spot):
    picture, heat, _ = panels((256, 256), spot)
    assert (picture == 100).all()
    assert (heat[200:, 200:] == 100).all()
    np.testing.assert_allclose(heat[64, 64], 0.4 * 100 + 0.6 * np.array(plasma(1)), atol=3)


def test_mask_and_outline_appear_where_the_map_is_above_the_threshold(spot):
    _, _, mask = panels((256, 256), spot)
    assert (mask[200:, 200:] == 100).all()
    inside = mask[64, 64]
    assert inside[0] > inside[1]
    red = (mask == MARKED).all(axis=2)
    assert red.any()
    rows, columns = np.nonzero(red)
    np.testing.assert_allclose([rows.min(), rows.max(), columns.min(), columns.max()], [32, 95, 32, 95], atol=3)
    assert not red[50:78, 50:78].any()  # an outline, not an area


def test_the_true_mask_is_outlined_in_a_colour_of_its_own(spot):
    true_mask = np.zeros((32, 32), bool)
    true_mask[16:24, 8:24] = True
    picture, heat, mask = panels((256, 256), spot, 0.5, true_mask)
    rows, columns = np.nonzero((mask == TRUE).all(axis=2))
    np.testing.assert_allclose([rows.min(), rows.max(), columns.min(), columns.max()], [128, 191, 64, 191], atol=2)
    assert (mask[140:180, 80:180] == 100).all()  # an outline, not an area
    assert (mask == MARKED).all(axis=2).any()
    without = panels((256, 256), spot)
    assert (picture == without[0]).all() and (heat == without[1]).all()
    assert (panels((256, 256), spot, 0.5, np.zeros((32, 32), bool))[2] == without[2]).all()


@pytest.mark.parametrize(("value", "threshold", "marked"), [(0.5, 0.5, False), (0.51, 0.5, True), (0.0, 0.5, False)])
def test_pixels_count_above_the_threshold_only(value, threshold, marked):
    for panel in panels((256, 256), np.full((64, 64), value), threshold)[1:]:
        assert (panel[128, 128] != 100).any() == marked


@pytest.mark.parametrize(("shape", "height"), [((100, 80), 256), ((1000, 500), 768), ((500, 300), 500)])
def test_panels_are_between_256_and_768_high(spot, shape, height):
    for panel in panels(shape, spot):
        assert panel.shape[0] == height
        assert panel.shape[1] == pytest.approx(shape[1] * height / shape[0], abs=1)


SHAPES = [(32, 32), (256, 256), (900, 900), (3000, 4000), (100, 4000), (3000, 100), (600, 200), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("threshold", "score"), [(0.8, 0.9), (0, 1.0), (1, 1.0), (1.5, 0.5), (-1e6, 0.5), (1e12, 0.5)])
def test_texts_fit_at_any_size(spot, shape, threshold, score):
    mask = spot > 0
    drawing = draw_result(np.full((*shape, 3), 255, np.uint8), spot, score, threshold, threshold, mask)
    ink = np.nonzero((drawing < 250).any(axis=(0, 2)))[0]
    assert ink.min() > 0 and ink.max() < drawing.shape[1] - 1  # nothing reaches over the edge
    caption = drawing[: min(drawing.shape[0] // 8, 64)]
    assert (caption < 128).any() and (caption[0] == 255).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_grow_with_the_panels(spot, shape):
    drawing = draw_result(np.full((*shape, 3), 255, np.uint8), np.zeros((8, 8)), 0.5, 0.8, 0.8)
    rows = (drawing < 128).any(axis=(1, 2))
    first = np.flatnonzero(rows)[0]
    letters = np.flatnonzero(~rows[first:])[0]  # height of the caption's
    assert letters >= 12
    assert letters >= max(drawing.shape[:2]) / 100


@pytest.mark.parametrize(("shape", "stacked"), [((256, 512), False), ((256, 513), True), ((768, 768), False)])
def test_panels_of_wide_pictures_are_one_above_the_other(spot, shape, stacked):
    height, width = draw_result(np.zeros((*shape, 3), np.uint8), spot, 0.5, 0.8, 0.5).shape[:2]
    assert (width < 2 * shape[1]) == stacked == (height > 3 * shape[0])


def test_the_bar_and_the_legend_show_what_the_panels_have():
    picture = np.full((256, 256, 3), 255, np.uint8)

    def colours(drawing):
        return {name for name, colour in (("true", TRUE), ("hot", plasma(1))) if (drawing == colour).all(axis=2).any()}

    nothing = np.zeros((8, 8), bool)
    assert colours(draw_result(picture, np.zeros((8, 8)), 0.5, 0.8, 0.5)) == {"hot"}
    assert colours(draw_result(picture, np.zeros((8, 8)), 0.5, 0.8, 0.5, nothing)) == {"hot"}
    assert colours(draw_result(picture, np.zeros((8, 8)), 0.5, 0.8, 1.0, ~nothing)) == {"true"}


@pytest.mark.parametrize("shape", [(1, 1), (3000, 1), (1, 400), (10, 2000), (64, 8000)])
def test_a_figure_of_any_shape_can_be_written_as_jpeg(tmp_path, spot, shape):
    drawing = draw_result(np.zeros((*shape, 3), np.uint8), spot, 0.6, 0.8, 0.5)
    assert drawing.nbytes < 100e6
    write_picture(tmp_path / "figure.jpg", drawing)
    assert read_rgb(tmp_path / "figure.jpg").shape == drawing.shape


@pytest.mark.parametrize("shape", [(1, 1), (3000, 1), (100, 80), (500, 300), (1000, 700), (64, 8000), (10, 2000)])
def test_a_picture_kept_as_large_as_it_is_drawn_is_drawn_the_same(spot, shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    kept = drawn_size(picture)
    assert kept.nbytes <= 768 * 4096 * 3
    np.testing.assert_array_equal(draw_result(kept, spot, 0.6, 0.8, 0.5), draw_result(picture, spot, 0.6, 0.8, 0.5))


def test_drawing_does_not_change_the_picture(spot):
    picture = np.full((256, 256, 3), 100, np.uint8)
    draw_result(picture, spot, 0.9, 0.8, 0.5)
    assert (picture == 100).all()


# ---- write_picture


def test_a_written_picture_has_the_format_of_its_suffix_and_its_colours(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8) + np.uint8([200, 30, 90])
    write_picture(tmp_path / "new" / "p.png", picture)
    with Image.open(tmp_path / "new" / "p.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture)
    assert os.listdir(tmp_path / "new") == ["p.png"]


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        write_picture(tmp_path / "file" / "p.jpg", np.zeros((4, 4, 3), np.uint8))
