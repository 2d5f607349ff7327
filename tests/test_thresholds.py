"""Thresholds: the rules, what they promise, and the file that binds them to a checkpoint."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml

from datasets.layout import Folder
from datasets.mvtec import Category, GroundTruth
from deploy.common.cli import UserError
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Thresholds
from utils.config import load_config
from utils.evaluation import Scores, measure_all
from utils.thresholds import (
    alarm_line,
    broken_promise,
    calibrate_f1,
    calibrate_quantile,
    held_out_pictures,
    load_thresholds,
    outcome,
    write_thresholds,
)

TRAIN = Path("data/part/train/good")


def good_scores(image, pixel=None):
    """Scores of good pictures whose maps of 2 x 3 have the given maxima."""
    image = np.asarray(image, np.float32)
    maxima = image if pixel is None else np.asarray(pixel, np.float32)
    maps = np.zeros((len(image), 2, 3), np.float32)
    maps[:, 1, 2] = maxima
    return Scores(image, maps)


# ---- quantile


@pytest.mark.parametrize(
    ("n", "rate", "rank"),
    [
        pytest.param(19, 0.05, 19, id="20 * 0.95: just the largest"),
        pytest.param(20, 0.05, 20, id="21 * 0.95 = 19.95"),
        pytest.param(39, 0.05, 38, id="40 * 0.95"),
        pytest.param(99, 0.1, 90, id="100 * 0.9"),
        pytest.param(29, 0.7, 9, id="30 * 0.3, which floats make more than 9"),
        pytest.param(1, 0.5, 1, id="one picture"),
    ],
)
def test_the_threshold_is_the_kth_smallest_score(n, rate, rank, capsys):
    scores = np.random.default_rng(n).permutation(n) + 1
    calibration = calibrate_quantile(TRAIN, good_scores(scores / 256), rate)
    assert calibration.thresholds == Thresholds(rank / 256, rank / 256, "quantile", "quantile")
    assert calibration.false_alarm_rate == rate
    assert (calibration.pictures, calibration.defects, calibration.folder) == (n, 0, TRAIN)
    assert not capsys.readouterr().err


def test_too_few_pictures_give_the_largest_score_and_say_what_it_promises(capsys):
    calibration = calibrate_quantile(TRAIN, good_scores([0.25, 0.75, 0.5]), 0.05)
    assert calibration.thresholds.image == 0.75
    assert calibration.false_alarm_rate == 0.25
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 held-out pictures cannot promise a false-alarm rate of 0.05" in line
    assert "0.25" in line
    assert str(TRAIN) in line


def test_pixels_are_calibrated_on_the_largest_of_each_picture():
    calibration = calibrate_quantile(TRAIN, good_scores([0.5, 0.5, 0.5], [0.25, 0.75, 0.5]), 0.5)
    assert calibration.thresholds.pixel == 0.5


def test_a_new_good_picture_raises_a_false_alarm_as_seldom_as_promised():
    random = np.random.default_rng(0)
    alarms = []
    for _ in range(4000):
        *held_out, new = random.exponential(size=25) / 50
        alarms.append(new > calibrate_quantile(TRAIN, good_scores(held_out), 0.1).thresholds.image)
    # It is the 24th of 25, so the probability is 2 / 26; the mean of 4000 draws deviates from it by 0.0042.
    assert np.mean(alarms) == pytest.approx(2 / 26, abs=0.015)


def category_of(*names):
    """A category with good pictures of these names."""
    good = Folder(TRAIN, None, [TRAIN / name for name in names], [])
    return Category("part", good.pictures, [], [good], [], None)


def test_held_out_pictures_are_found_by_name():
    category = category_of("a.png", "b.png", "c.png")
    found = held_out_pictures(category, {"held_out": ["c.png", "a.png"]}, Path("best.pdparams"))
    assert found == [TRAIN / "c.png", TRAIN / "a.png"]


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({}, ["best.pdparams", "auto.yaml", "holdout=0.1"]),
        ({"held_out": []}, ["best.pdparams", "auto.yaml"]),
        ({"held_out": ["a.png", "gone.png"]}, ["gone.png", "1 of 2", "--data"]),
        ({"held_out": ["../../test/bad/a.png"]}, ["test/bad/a.png"]),
    ],
)
def test_without_the_held_out_pictures_there_is_one_clear_line(checkpoint, words):
    category = category_of("a.png")
    with pytest.raises(UserError) as error:
        held_out_pictures(category, checkpoint, Path("best.pdparams"))
    assert all(word in str(error.value) for word in words)


# ---- f1


@pytest.fixture
def measured():
    """Three good and two defect pictures of 2 x 2 with masks, one of them hard."""
    image = np.float32([0.2, 0.3, 0.6, 0.5, 0.9])
    labels = np.array([False, False, False, True, True])
    maps = np.zeros((5, 2, 2), np.float32)
    masks = np.zeros((5, 2, 2), bool)
    masks[3:, 0] = True
    maps[3, 0] = 0.4
    maps[4, 0] = 0.8
    maps[2, 1, 1] = 0.6
    return Scores(image, maps), GroundTruth(labels, masks)


def test_f1_takes_the_best_thresholds_of_the_test_set(measured):
    calibration = calibrate_f1(Path("test"), measure_all(*measured), *measured)
    half_way = (float(np.float32(0.3)) + 0.5) / 2  # the highest that is rejected and the lowest that is accepted
    just_below = float(np.nextafter(np.float32(0.4), np.float32(0)))
    assert calibration.thresholds == Thresholds(half_way, just_below, "f1", "f1")
    assert (calibration.pictures, calibration.defects, calibration.false_alarm_rate) == (5, 2, None)
    assert outcome(calibration.thresholds, *measured) == {
        "image_f1": 4 / 5,
        "pixel_f1": 8 / 9,
        "good_test_pictures": 3,
        "false_alarms": 1,
        "defect_test_pictures": 2,
        "missed_defects": 0,
    }


def test_without_masks_the_pixel_threshold_stays_the_published_one(measured):
    scores, truth = measured
    truth = GroundTruth(truth.labels, None)
    thresholds = calibrate_f1(Path("test"), measure_all(scores, truth), scores, truth).thresholds
    assert (thresholds.pixel, thresholds.rule, thresholds.pixel_rule) == (0.8, "f1", "published")
    assert outcome(thresholds, scores, truth)["pixel_f1"] is None
    assert thresholds.describe() == "image 0.400 (f1), pixel 0.800 (published)"


@pytest.mark.parametrize("below", [0.0, 0.25, 0.99999994])
def test_f1_decides_alike_in_float32_and_float64_between_neighbours(below):
    """Scores near 1 crowd: between neighbours of float32 there is no third one to be the threshold."""
    scores = np.float32([below, np.nextafter(np.float32(below), np.float32(2))])
    truth = GroundTruth(np.array([False, True]), None)
    maps = Scores(scores, np.zeros((2, 4, 4), np.float32))
    threshold = calibrate_f1(Path("test"), measure_all(maps, truth), maps, truth).thresholds.image
    assert (scores > threshold).tolist() == [False, True]
    assert [float(score) > threshold for score in scores] == [False, True]


@pytest.mark.parametrize("kept", [slice(0, 3), slice(3, 5), slice(0, 0)], ids=["no defects", "no good", "nothing"])
def test_f1_needs_both_kinds_of_pictures(measured, kept, capsys):
    scores, truth = Scores(measured[0].image[kept], measured[0].pixel[kept]), measured[1]
    truth = GroundTruth(truth.labels[kept], truth.masks[kept])
    assert calibrate_f1(Path("data/part/test"), measure_all(scores, truth), scores, truth) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "--threshold_rule quantile" in line
    assert "data/part/test" in line


def test_the_outcome_of_thresholds_that_miss(measured):
    figures = outcome(Thresholds(0.55, 0.7, "quantile", "quantile"), *measured)
    assert (figures["false_alarms"], figures["missed_defects"]) == (1, 1)
    assert figures["image_f1"] == 1 / 2
    assert figures["pixel_f1"] == 4 / 6


# ---- thresholds.yaml


@pytest.fixture
def stored(tmp_path, config, measured):
    """A checkpoint and its thresholds: the checkpoint's path and the calibration."""
    checkpoint = tmp_path / "best.pdparams"
    checkpoint.write_bytes(b"weights")
    calibration = calibrate_f1(Path("数据/part/test"), measure_all(*measured), *measured)
    path = write_thresholds(checkpoint, 7, config, calibration, outcome(calibration.thresholds, *measured))
    assert path == tmp_path / "thresholds.yaml"
    return checkpoint, calibration


def test_stored_thresholds_come_back_to_the_last_bit(stored, config):
    checkpoint, calibration = stored
    assert load_thresholds(checkpoint, config) == calibration.thresholds


def test_the_file_says_where_they_come_from(stored):
    checkpoint, calibration = stored
    content = yaml.safe_load((checkpoint.parent / "thresholds.yaml").read_text(encoding="utf-8"))
    assert content["rule"] == "f1"
    assert content["image_threshold"] == calibration.thresholds.image
    assert content["data"] == {"folder": "数据/part/test", "pictures": 5, "defects": 2}
    assert content["figures"]["image_f1"] == 4 / 5
    assert (content["checkpoint"], content["epoch"]) == ("best.pdparams", 7)
    assert content["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_no_file_no_thresholds(tmp_path, config, capsys):
    assert load_thresholds(tmp_path / "best.pdparams", config) is None
    assert not capsys.readouterr().err


def test_thresholds_of_another_checkpoint_are_not_used(stored, config, capsys):
    checkpoint, _ = stored
    checkpoint.write_bytes(b"trained again")
    assert load_thresholds(checkpoint, config) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "another checkpoint" in line
    assert "eval.py" in line


TOP = ["image_score=top", "top_share=0.01"]


@pytest.mark.parametrize(
    ("calibrated", "used", "told"),
    [
        (TOP, TOP, None),
        ([], ["top_share=0.01"], None),  # which no maximum depends on
        (TOP, [], "of image_score top 0.01, not max,"),
        ([], TOP, "of image_score max, not top 0.01,"),
        (TOP, [*TOP, "top_share=0.02"], "of image_score top 0.01, not top 0.02,"),
    ],
)
def test_thresholds_of_another_image_score_are_not_used(stored, measured, calibrated, used, told, capsys):
    checkpoint, calibration = stored
    calibrated, used = (load_config("configs/resnet18.yaml", overrides) for overrides in (calibrated, used))
    write_thresholds(checkpoint, 7, calibrated, calibration, outcome(calibration.thresholds, *measured))
    assert load_thresholds(checkpoint, used) == (None if told else calibration.thresholds)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == bool(told)
    assert all(told in line and "--threshold_rule f1" in line for line in warnings)


def test_thresholds_from_before_there_was_a_choice_are_of_the_maximum(stored, config, capsys):
    checkpoint, calibration = stored
    path = checkpoint.parent / "thresholds.yaml"
    older = yaml.safe_load(path.read_text())
    del older["image_score"], older["top_share"]
    path.write_text(yaml.safe_dump(older))
    assert load_thresholds(checkpoint, config) == calibration.thresholds
    assert load_thresholds(checkpoint, load_config("configs/resnet18.yaml", TOP)) is None
    assert "of image_score max, not top 0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"image_threshold": "0.5"},
        {"image_threshold": float("nan")},
        {"pixel_threshold": 80},
        {"pixel_threshold": True},
        {"pixel_threshold": None},
        {"rule": "best"},
        {"rule": ["f1"]},
        {"pixel_rule": "none"},
    ],
)
def test_wrong_values_are_refused(stored, config, change):
    checkpoint, _ = stored
    path = checkpoint.parent / "thresholds.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"thresholds\.yaml: damaged"):
        load_thresholds(checkpoint, config)


@pytest.mark.parametrize(
    "content",
    [b"", b"f1", b"- 0.5", b"rule: f1", b"{", b"\xff\xfe", b"a: !!python/object/apply:os.system [exit 1]"],
)
def test_a_damaged_file_is_a_user_error(stored, config, content):
    checkpoint, _ = stored
    (checkpoint.parent / "thresholds.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"thresholds\.yaml: damaged"):
        load_thresholds(checkpoint, config)


def test_the_published_thresholds():
    assert (PUBLISHED_THRESHOLDS.image, PUBLISHED_THRESHOLDS.pixel, PUBLISHED_THRESHOLDS.rule) == (
        0.8,
        0.8,
        "published",
    )


# ---- what the thresholds come to


def decisions(alarms, good):
    return {"false_alarms": alarms, "good_test_pictures": good, "missed_defects": 0, "defect_test_pictures": 20}


@pytest.mark.parametrize(
    ("rate", "promised"),
    [(0.1, " (promised 0.10)"), (None, ""), (0.004, " (promised 0.004)"), (1 / 3, " (promised 0.33)")],
)
def test_false_alarms_and_misses_are_a_line_with_the_promise(rate, promised):
    assert alarm_line(decisions(15, 18), rate) == f"false alarms 15 of 18 good{promised}, missed 0 of 20 defects"


@pytest.mark.parametrize(
    ("alarms", "good", "rate", "broken"),
    [
        (15, 18, 0.1, True),
        (6, 18, 0.1, True),  # 0.6 percent
        (5, 18, 0.1, False),  # 2.8 percent
        (0, 18, 0.1, False),
        (0, 0, 0.1, False),
        (1, 1, 0.05, False),
        (30, 3000, 0.01, False),
        (60, 3000, 0.01, True),
    ],
)
def test_a_broken_promise_is_told_beyond_chance(alarms, good, rate, broken):
    assert bool(broken_promise(decisions(alarms, good), rate)) == broken
    by_scipy = scipy.stats.binom.sf(alarms - 1, good, rate)
    assert (by_scipy < 0.01) == broken
