"""What a model can find, measured with drawn defects."""

import json
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from deploy.common.cli import UserError
from deploy.common.decisions import Thresholds
from deploy.common.imaging import read_rgb
from utils.sensitivity import (
    SIZES,
    found_from,
    load_sensitivity,
    measure_sensitivity,
    print_sensitivity,
    sensitivity_line,
    sensitivity_table,
    short_form,
    write_sensitivity,
)

THRESHOLDS = Thresholds(0.5, 0.5, "quantile", "quantile")


class Eye:
    """In the place of a model: its score grows with the area that is not as in the good pictures."""

    config = SimpleNamespace(size=(64, 64), seed=0)

    def __init__(self, area):
        self._area = area

    def eval(self):
        pass

    def __call__(self, images):
        usual = images.flatten(2).median(axis=2, keepdim=True).unsqueeze(3)
        changed = (images - usual).abs().max(axis=1) > 0.1
        return None, None, changed.astype("float32").sum(axis=[1, 2]) / (2 * self._area)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Plain grey pictures of twice the input's size."""
    folder = tmp_path_factory.mktemp("good")
    paths = [folder / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new("RGB", (128, 128), (100, 100, 100)).save(path)
    return paths


def measured(good, area=40, scores=(0.1, 0.2, 0.3), rate=0.05):
    return measure_sensitivity(Eye(area), good, np.float32(scores), THRESHOLDS, rate, read_rgb)


@pytest.fixture(scope="module")
def measurement(good):
    return measured(good)


def test_larger_defects_are_found_and_the_size_is_in_pixels_of_the_pictures(measurement):
    content = measurement.content
    assert [row["input_px"] for row in content["by_size"]] == list(SIZES)
    assert [row["picture_px"] for row in content["by_size"]] == [2 * size for size in SIZES]
    assert content["picture_size"] == [128, 128]
    blobs = [row["by_kind"]["blob"] for row in content["by_size"]]
    assert blobs[0]["found"] == 0
    assert all(blob["found"] == blob["drawn"] > 0 for blob in blobs[4:-1])
    assert blobs[-1]["drawn"] == 0  # as large as the picture
    assert not any(row["by_kind"]["smear"]["drawn"] for row in content["by_size"])  # nothing to smear in plain grey


def test_it_is_the_same_each_time(good, measurement):
    assert measured(good).content == measurement.content


def test_the_line_says_what_is_found_at_which_rate_and_that_it_is_drawn():
    rows = [{"picture_px": 400.0, "drawn": 24}, {"picture_px": 900.0, "drawn": 0}]
    content = {"picture_size": [1200, 1600], "false_alarm_rate": 0.05, "rate_is": "promised", "by_size": rows}
    content |= {"found_from_px": 14.2, "faint_found_from_px": 64}
    start = "spots of 14 px (of 1600 px) and more are found in 9 of 10 cases at a false alarm rate of 0.05"
    assert sensitivity_line(content) == f"{start} (drawn ones, of contrast 0.2 and more; fainter ones from 64 px on)"
    assert sensitivity_line({**content, "faint_found_from_px": None}).endswith(
        "; fainter ones of no size up to 400 px)"
    )
    assert sensitivity_line({**content, "found_from_px": None}) == (
        "spots of no size up to 400 px (of 1600 px) are found in 9 of 10 cases at a false alarm rate of 0.05 "
        "(drawn ones, of contrast 0.2 and more)"
    )
    assert f"{start}, measured on held-out" in sensitivity_line({**content, "rate_is": "measured on held-out pictures"})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0, 5, 9, 10], 3),
        ([0, 9, 8, 10], 4),  # 2 and 3 together: 17 of 20
        ([0, 10, 8, 10], 2),  # 18 of 20
        ([9, 9, 9, 9], 1),
        ([0, 0, 0, 8], None),
        ([10, 10, 10, 0], None),
    ],
)
def test_the_size_from_which_on_nine_of_ten_are_found(found, expected):
    def row(size, drawn, hits):
        """Half of them of each contrast, and all faint ones found."""
        parts = {"0.2": {"drawn": drawn // 2, "found": hits // 2}, "0.4": {"drawn": drawn // 2, "found": -(-hits // 2)}}
        return {"picture_px": size, "by_contrast": {"0.1": {"drawn": 99, "found": 99}, **parts}}

    rows = [row(i, 10, hits) for i, hits in enumerate(found, start=1)]
    assert found_from([*rows, row(9, 0, 0)], [0.2, 0.4]) == expected
    assert found_from(rows, [0.1]) == 1


def test_pictures_that_are_anomalies_anyway_say_nothing(good):
    content = measured(good, scores=(0.1, 0.9, 0.9), rate=None).content
    assert content["above_threshold_undrawn"] == 2
    assert content["false_alarm_rate"] == pytest.approx(2 / 3)
    assert "measured" in content["line"]
    with pytest.raises(UserError, match="all 3 held-out pictures are above the image threshold"):
        measured(good, scores=(0.9, 0.9, 0.9))


def test_what_is_written_is_found_again_for_the_same_checkpoint_and_threshold_only(measurement, tmp_path, capsys):
    checkpoint = tmp_path / "best.pdparams"
    checkpoint.write_bytes(b"weights")
    assert load_sensitivity(checkpoint, 0.5) is None
    write_sensitivity(measurement, checkpoint)
    assert Image.open(tmp_path / "sensitivity.png").width > 500
    content = load_sensitivity(checkpoint, 0.5)
    assert content["by_size"] == measurement.content["by_size"]
    assert load_sensitivity(checkpoint, 0.51) is None
    short = short_form(content)
    assert json.dumps(short)
    assert next(iter(short["share_found_by_px"])) == "4"
    table = sensitivity_table(content)
    assert len(table) == 1 + len(SIZES) and len(set(map(len, table))) == 1
    print_sensitivity("part", content)
    assert capsys.readouterr().out.splitlines()[-1] == f"part: {content['line']}"
    checkpoint.write_bytes(b"other weights")
    assert load_sensitivity(checkpoint, 0.5) is None


@pytest.mark.parametrize("text", ["", "[]", '{"by_size": 1}', "{"])
def test_a_damaged_file_is_named_and_not_used(tmp_path, capsys, text):
    (tmp_path / "best.pdparams").write_bytes(b"weights")
    (tmp_path / "sensitivity.json").write_text(text)
    assert load_sensitivity(tmp_path / "best.pdparams", 0.5) is None
    assert "sensitivity.json: is damaged" in capsys.readouterr().err


def test_the_model_is_fed_what_training_is_fed(good):
    """Resized and normalised pictures, batches of (B, 3, H, W)."""
    shapes = []

    class Recording(Eye):
        def __call__(self, images):
            shapes.append(tuple(images.shape[1:]))
            assert paddle.max(images).item() < 3
            return super().__call__(images)

    measure_sensitivity(Recording(40), good, np.zeros(3, np.float32), THRESHOLDS, 0.05, read_rgb)
    assert set(shapes) == {(3, 64, 64)}
