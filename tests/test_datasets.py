"""Pictures of every kind, folders in MVTec's layout, and ground truth."""

import shutil
import threading
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import mvtec
from datasets.mvtec import GroundTruth, LabelledImage, list_categories, load_category, load_ground_truth, read_batches
from deploy.common.cli import UserError
from deploy.common.imaging import read_mask, read_rgb

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ---- read_rgb


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".TIFF"])
def test_lossless_rgb_is_read_exactly(tmp_path, suffix):
    picture = read_rgb(save(tmp_path / f"p{suffix}", RGB))
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, RGB)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_is_read(tmp_path, suffix):
    flat = np.full((16, 16, 3), [200, 100, 50], np.uint8)
    np.testing.assert_allclose(read_rgb(save(tmp_path / f"p{suffix}", flat, quality=95)), flat, atol=4)


def equal_channels(grey):
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".jpg"])
def test_grey_becomes_three_equal_channels(tmp_path, suffix):
    flat = np.full((16, 16), 77, np.uint8)
    np.testing.assert_array_equal(read_rgb(save(tmp_path / f"p{suffix}", flat)), equal_channels(flat))


def test_one_bit_becomes_black_and_white(tmp_path):
    path = save(tmp_path / "p.png", np.where(GREY > 100, 255, 0).astype(np.uint8), "1")
    np.testing.assert_array_equal(read_rgb(path), equal_channels(np.where(GREY > 100, 255, 0)))


def test_a_palette_becomes_its_colours(tmp_path):
    image = Image.fromarray((GREY > 100).astype(np.uint8), "L")
    image = image.convert("P")
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.save(tmp_path / "p.png", transparency=1)
    expected = np.where((GREY > 100)[..., None], [200, 150, 100], [10, 20, 30])
    np.testing.assert_array_equal(read_rgb(tmp_path / "p.png"), expected)


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([RGB, GREY])
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "p.png", rgba)), RGB)
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)])
    grey.save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "la.png"), equal_channels(GREY))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_to_8(tmp_path, suffix):
    wide = np.array([[0, 257, 32896, 65535, 300]], np.uint16)
    assert read_rgb(save(tmp_path / f"p{suffix}", wide))[0, :, 1].tolist() == [0, 1, 128, 255, 1]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_is_scaled_to_8(tmp_path, suffix, channels):
    wide = np.dstack([RGB, GREY])[..., [2, 1, 0, 3][:channels]].astype(np.uint16) * 257  # OpenCV writes BGR(A)
    assert cv2.imwrite(str(tmp_path / f"p{suffix}"), wide)
    np.testing.assert_array_equal(read_rgb(tmp_path / f"p{suffix}"), RGB)


def test_a_mask_is_white_where_any_channel_is(tmp_path):
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 1, 2] = 255
    assert read_mask(save(tmp_path / "m.png", rgb)).tolist() == [[0, 255], [0, 0]]


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_a_damaged_file_is_a_user_error_that_names_it(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    truncated(save(tmp_path / f"cut{suffix}", noise))
    (tmp_path / f"empty{suffix}").touch()
    (tmp_path / f"text{suffix}").write_text("not a picture")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("cut", "empty", "text", "folder", "absent"):
        with pytest.raises(UserError, match=rf"{name}\{suffix}"):
            read_rgb(tmp_path / f"{name}{suffix}")


def test_a_png_with_a_changed_byte_is_a_user_error(tmp_path):
    path = save(tmp_path / "p.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"p\.png"):
        read_rgb(path)


def test_a_decompression_bomb_is_a_user_error(tmp_path):
    path = save(tmp_path / "p.png", GREY)
    header = b"IHDR" + (60000).to_bytes(4) + (60000).to_bytes(4) + b"\x08\x00\x00\x00\x00"
    path.write_bytes(path.read_bytes()[:12] + header + zlib.crc32(header).to_bytes(4) + path.read_bytes()[33:])
    with pytest.raises(UserError, match=r"p\.png"):
        read_rgb(path)


# ---- categories


@pytest.fixture
def data(tmp_path):
    """A category of two defects, one of them without masks."""
    folder = tmp_path / "data" / "my part 1"
    for name in ("train/good/b.png", "train/good/a.JPG", "test/good/0.png", "test/good/1.tiff"):
        save(folder / name, RGB)
    for name in ("test/scratch/000.png", "test/scratch/001.bmp", "test/dent/000.png"):
        save(folder / name, RGB)
    for name in ("000_mask.png", "001_mask.png"):
        save(folder / "ground_truth" / "scratch" / name, np.full((6, 8), 255, np.uint8))
    (folder / "train" / "good" / "notes.txt").write_text("x")
    (folder / "train" / "good" / ".hidden.png").write_text("x")
    (folder / "license.txt").write_text("x")
    return tmp_path / "data"


def test_any_folder_name_is_a_category_and_everything_is_sorted(data):
    category = load_category(data, "my part 1")
    folder = data / "my part 1"
    masks = folder / "ground_truth" / "scratch"
    assert category.name == "my part 1"
    assert category.train == [folder / "train/good/a.JPG", folder / "train/good/b.png"]
    assert category.test == [
        LabelledImage(folder / "test/dent/000.png", "dent"),
        LabelledImage(folder / "test/good/0.png", None),
        LabelledImage(folder / "test/good/1.tiff", None),
        LabelledImage(folder / "test/scratch/000.png", "scratch", (masks / "000_mask.png",)),
        LabelledImage(folder / "test/scratch/001.bmp", "scratch", (masks / "001_mask.png",)),
    ]


def test_nothing_is_opened_before_it_is_needed(data):
    for path in (data / "my part 1").rglob("*.png"):
        path.write_text("not a picture")
    assert len(load_category(data, "my part 1").test) == 5


@pytest.mark.parametrize("name", ["000.png", "000_mask.PNG", "000_mask.bmp", "000.tif"])
def test_a_mask_may_have_the_pictures_own_name_and_any_suffix(data, name):
    masks = data / "my part 1" / "ground_truth" / "scratch"
    (masks / "000_mask.png").unlink()
    save(masks / name, GREY)
    assert load_category(data, "my part 1").test[3].masks == (masks / name,)


def test_the_name_with_mask_goes_first(data):
    masks = data / "my part 1" / "ground_truth" / "scratch"
    save(masks / "000.png", GREY)
    assert load_category(data, "my part 1").test[3].masks == (masks / "000_mask.png",)


def test_one_missing_mask_among_others_is_a_user_error_that_names_it(data):
    (data / "my part 1" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    with pytest.raises(UserError, match=r"001_mask\.png"):
        load_category(data, "my part 1")


@pytest.mark.parametrize("folder", ["ground_truth", "ground_truth/scratch"])
def test_masks_may_be_missing_as_a_whole(data, folder):
    shutil.rmtree(data / "my part 1" / folder)
    category = load_category(data, "my part 1")
    assert all(image.masks == () for image in category.test)
    truth = load_ground_truth(category.test, (16, 16), "published")
    assert truth.masks is None
    assert truth.labels.tolist() == [True, False, False, True, True]


def test_an_empty_mask_folder_is_as_none(data):
    for path in (data / "my part 1" / "ground_truth" / "scratch").iterdir():
        path.unlink()
    assert load_category(data, "my part 1").test[3].masks == ()


@pytest.mark.parametrize("folder", ["train", "train/good"])
def test_a_missing_folder_is_named(data, folder):
    (data / "my part 1" / folder).rename(data / "elsewhere")
    with pytest.raises(UserError, match=folder):
        load_category(data, "my part 1")


@pytest.mark.parametrize("folder", ["train/good", "test/good"])
def test_an_empty_folder_is_named(data, folder):
    for path in (data / "my part 1" / folder).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=folder):
        load_category(data, "my part 1")


def test_the_test_folder_may_be_missing(data):
    (data / "my part 1" / "test").rename(data / "elsewhere")
    category = load_category(data, "my part 1")
    assert len(category.train) == 2
    assert category.test == []
    assert list_categories(data) == ["my part 1"]
    truth = load_ground_truth([], 16, "half")
    assert truth.labels.shape == (0,)
    assert truth.labels.dtype == bool
    assert truth.masks is None


def test_a_test_folder_without_pictures_of_any_kind_is_named(data):
    (data / "my part 1" / "test").rename(data / "elsewhere")
    (data / "my part 1" / "test").mkdir()
    with pytest.raises(UserError, match="test"):
        load_category(data, "my part 1")


def test_hidden_folders_are_no_defects(data):
    save(data / "my part 1" / "test" / ".thumbnails" / "0.png", RGB)
    (data / "my part 1" / "test" / ".ipynb_checkpoints").mkdir()
    assert {image.defect for image in load_category(data, "my part 1").test} == {None, "dent", "scratch"}


@pytest.mark.parametrize("name", ["absent", "", ".", "..", "../data/my part 1", "my part 1/test"])
def test_a_name_that_is_no_category_is_a_user_error(data, name):
    with pytest.raises(UserError):
        load_category(data, name)


def test_a_wrong_name_is_answered_with_those_there_are(data):
    with pytest.raises(UserError, match=r"absent.*my part 1"):
        load_category(data, "absent")


def test_categories_are_mvtecs_in_the_published_order_then_others_by_name(tmp_path):
    for name in ("zebra", "wood", "apple", "bottle", "screw"):
        (tmp_path / name / "test").mkdir(parents=True)
    (tmp_path / "no category").mkdir()
    (tmp_path / "license.txt").touch()
    assert list_categories(tmp_path) == ["screw", "bottle", "wood", "apple", "zebra"]
    assert len(set(mvtec.MVTEC_CATEGORIES)) == 15


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_a_data_folder_without_categories_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=name):
        list_categories(tmp_path / name)
    with pytest.raises(UserError, match=name):
        load_category(tmp_path / name, "bottle")


# ---- ground truth


@pytest.fixture
def masked(tmp_path):
    """`masked(mask, ...)` is the ground truth of a good picture and one defect picture for each mask."""

    def make(*masks, size=(4, 4), rule="published") -> GroundTruth:
        test = [LabelledImage(tmp_path / "good.png", None)]
        for i, mask in enumerate(masks):
            path = save(tmp_path / f"{i}_mask.png", np.array(mask, np.uint8))
            test.append(LabelledImage(tmp_path / f"{i}.png", "dent", (path,)))
        return load_ground_truth(test, size, rule)

    return make


SOFT = [[0, 0, 0, 0], [0, 255, 254, 0], [0, 128, 127, 0], [0, 0, 0, 0]]  # an anti-aliased border


def test_published_rule_takes_only_full_white(masked):
    truth = masked(SOFT)
    assert truth.masks.shape == (2, 4, 4)
    assert truth.masks.dtype == truth.labels.dtype == bool
    assert np.argwhere(truth.masks).tolist() == [[1, 1, 1]]
    assert truth.labels.tolist() == [False, True]


def test_half_rule_takes_128_and_more(masked):
    assert np.argwhere(masked(SOFT, rule="half").masks).tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 1]]


def test_a_larger_mask_loses_its_mixed_border_under_the_published_rule(masked):
    mask = np.zeros((9, 9), np.uint8)
    mask[:, 4:] = 255
    assert masked(mask, size=(3, 3)).masks[1].tolist() == [[False, True, True]] * 3  # its centres are columns 1, 4, 7
    mixed = mask[:, [4, 0, 0]]  # 255 0 0: three quarters of 255, then 0
    assert masked(mixed, size=(2, 2)).masks[1].tolist() == [[False, False]] * 2
    assert masked(mixed, size=(2, 2), rule="half").masks[1].tolist() == [[True, False]] * 2


def test_a_mask_without_a_white_pixel_is_normal_as_published_and_a_defect_by_its_folder(masked, capsys):
    weak = np.full((4, 4), 200)
    assert masked(weak).labels.tolist() == [False, False]
    assert "0_mask.png" in capsys.readouterr().err
    assert masked(weak, rule="half").labels.tolist() == [False, True]
    assert masked(np.zeros((4, 4)), rule="half").labels.tolist() == [False, True]


def test_each_mask_belongs_to_its_picture_and_may_have_its_own_size(masked):
    small, large = np.zeros((2, 2)), np.full((20, 10), 255)
    small[0, 0] = 255
    truth = masked(small, large, size=(2, 2))
    assert truth.masks.tolist() == [
        [[False, False], [False, False]],
        [[True, False], [False, False]],
        [[True, True], [True, True]],
    ]


def test_a_mask_of_another_shape_is_stretched_along_each_axis_by_itself(masked):
    mask = np.zeros((6, 40))
    mask[:3, :10] = 255  # upper half, left quarter
    truth = masked(mask, size=(4, 8))
    assert truth.masks.shape == (2, 4, 8)
    assert np.argwhere(truth.masks[1]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_damaged_mask_is_named(tmp_path):
    (tmp_path / "0_mask.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"0_mask\.png"):
        load_ground_truth([LabelledImage(tmp_path / "0.png", "dent", (tmp_path / "0_mask.png",))], (4, 4), "published")


# ---- read_batches


@pytest.fixture
def numbered(tmp_path):
    """Eleven pictures, each of its own grey value, in no order of name."""
    return [save(tmp_path / f"{(7 * i) % 11}.png", np.full((4, 6), 10 * i, np.uint8)) for i in range(11)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 64])
def test_batches_keep_the_order_and_the_last_may_be_short(numbered, batch_size):
    batches = list(read_batches(numbered, batch_size, (8, 5)))
    full, rest = divmod(11, batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * full + [rest] * (rest > 0)
    whole = np.concatenate(batches)
    assert whole.shape == (11, 8, 5, 3)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole[:, 0, 0, 0], 10 * np.arange(11))


def test_pictures_are_read_at_most_two_batches_ahead(numbered):
    opened = set()
    lock = threading.Lock()

    def note(path):
        with lock:
            opened.add(path)
        return read_rgb(path)

    batches = read_batches(numbered, 2, (8, 8), note)
    assert not opened
    next(batches)
    assert opened <= set(numbered[:6])
    next(batches)
    assert opened <= set(numbered[:8])
    batches.close()
    assert len(opened) < 11


def test_a_damaged_picture_is_named_when_its_batch_is_reached(numbered):
    truncated(numbered[7])
    batches = read_batches(numbered, 3, (8, 8))
    next(batches)
    next(batches)
    with pytest.raises(UserError, match=numbered[7].name):
        next(batches)


def test_reading_in_threads_leaves_the_warning_filters_alone(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    paths = [save(tmp_path / f"{i}.png", noise) for i in range(24)]
    with warnings.catch_warnings():
        before = list(warnings.filters)
        for _ in range(10):
            list(read_batches(paths, 8, (16, 16)))
        assert warnings.filters == before
