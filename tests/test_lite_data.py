"""The drawn data set: the committed files are what the code draws, and the masks are exact."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets import lite_data

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
DEFECT_KINDS = ("broken_large", "broken_small", "contamination")
NOTICEABLE = 4 / 255


def pictures_in(*folders):
    """Every PNG file below the folders, as a path relative to each one's parent, sorted."""
    return sorted(path.relative_to(folder.parent) for folder in folders for path in folder.rglob("*.png"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder, samples): all files drawn anew, and the samples {(split, index)} behind them."""
    folder, samples = tmp_path_factory.mktemp("drawn"), {}
    draw_sample = lite_data.draw_sample

    def remember(seed, split, index):
        return samples.setdefault((split, index), draw_sample(seed, split, index))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite_data, "draw_sample", remember)
        for path, pixels in lite_data.draw_all(0, folder / "lite_data", folder / "images"):
            lite_data.write_png(path, pixels)
    return folder, samples


@pytest.fixture(scope="module")
def damaged(drawn):
    """The samples that have a defect."""
    return [sample for sample in drawn[1].values() if sample.mask.any()]


def test_the_committed_files_are_drawn_again_byte_for_byte(drawn):
    folder, _ = drawn
    names = pictures_in(folder / "lite_data", folder / "images")
    committed = pictures_in(ROOT / "lite_data")
    assert [name for name in names if name.parts[0] == "lite_data"] == committed
    for name in names:
        again, kept = folder / name, ROOT / name
        pixels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (again, kept)]
        np.testing.assert_array_equal(*pixels, err_msg=f"{name}: the pixels differ")
        assert again.read_bytes() == kept.read_bytes(), f"{name}: same pixels, packed differently"


def test_layout_counts_and_size():
    bottle = ROOT / "lite_data" / "bottle"
    counts = {"train/good": 24, "test/good": 8} | {f"test/{kind}": 6 for kind in DEFECT_KINDS}
    for split, count in counts.items():
        names = [path.name for path in sorted((bottle / split).iterdir())]
        assert names == [f"{index:03d}.png" for index in range(count)]
    for kind in DEFECT_KINDS:
        names = [path.name for path in sorted((bottle / "ground_truth" / kind).iterdir())]
        assert names == [f"{index:03d}_mask.png" for index in range(6)]
    files = [ROOT / name for name in pictures_in(ROOT / "lite_data", ROOT / "images")]
    assert sum(path.stat().st_size for path in files) < 12e6


def test_pictures_are_colour_and_masks_black_and_white(drawn):
    for sample in drawn[1].values():
        assert sample.picture.shape == (256, 256, 3) and sample.picture.dtype == np.uint8
        assert sample.mask.shape == (256, 256) and sample.mask.dtype == np.uint8
        assert set(np.unique(sample.mask)) <= {0, 255}


def test_nothing_changes_away_from_the_mask(damaged):
    assert len(damaged) == 19  # 18 of the test split and the bad example
    reach = np.ones((2 * lite_data.BLUR_RADIUS + 1,) * 2, np.uint8)
    for sample in damaged:
        away = cv2.dilate(sample.mask, reach) == 0
        np.testing.assert_array_equal(sample.damaged[away], sample.flawless[away])


def test_the_mask_is_what_changed_noticeably(damaged):
    for sample in damaged:
        changed = np.abs(sample.damaged - sample.flawless).max(axis=2) > NOTICEABLE
        inside = sample.mask == 255
        assert changed[inside].mean() > 0.9
        # What the lens smears over the outline is at most a pixel wide.
        outline = cv2.dilate(sample.mask, np.ones((3, 3), np.uint8)) == 255
        assert not np.any(np.abs(sample.damaged - sample.flawless)[~outline] > 0.1)


def test_no_part_of_a_defect_is_thinner_than_three_pixels(damaged):
    square = np.ones((2, 2), np.uint8)  # a 3-pixel stroke, sampled slantwise, always holds 2 x 2
    for sample in damaged:
        opened = cv2.morphologyEx(sample.mask, cv2.MORPH_OPEN, square)
        assert np.count_nonzero(opened) > 0.97 * np.count_nonzero(sample.mask)


def test_the_examples_are_not_in_the_data_set(drawn):
    samples = drawn[1]
    examples = {split: sample for (split, _), sample in samples.items() if split.startswith("images/")}
    others = [sample.picture for (split, _), sample in samples.items() if split not in examples]
    assert not examples["images/good"].mask.any() and examples["images/broken_large"].mask.any()
    for example in examples.values():
        assert not any(np.array_equal(example.picture, other) for other in others)


def test_another_seed_draws_another_picture(drawn):
    first = drawn[1]["train/good", 0].picture
    assert not np.array_equal(first, lite_data.draw_sample(1, "train/good", 0).picture)
    assert not np.array_equal(first, drawn[1]["test/good", 0].picture)


def test_an_unwritable_folder_is_one_line_and_code_2(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    command = [sys.executable, "-m", "datasets.lite_data", "--output", tmp_path / "file" / "below"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
