"""Thresholds, and what a command tells of its pictures: lines, drawings, JSON, their sum."""

import json

import numpy as np
import pytest

from deploy.common.cli import UserError
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Places, Result, Results, Thresholds

PICTURE = np.zeros((8, 8, 3), np.uint8)
MAP = np.zeros((4, 4), np.float32)


def result(path, score):
    return Result(score, MAP, (8, 8), PUBLISHED_THRESHOLDS, PICTURE, path)


@pytest.mark.parametrize(
    ("image", "pixel", "expected"),
    [
        (None, None, Thresholds(0.7, 0.6, "f1", "published")),
        (0.0, None, Thresholds(0.0, 0.6, "--image_threshold", "published")),
        (None, 0.5, Thresholds(0.7, 0.5, "f1", "--pixel_threshold")),
        (0.4, 0.5, Thresholds(0.4, 0.5, "--image_threshold", "--pixel_threshold")),
    ],
)
def test_thresholds_that_are_given_win(image, pixel, expected):
    assert Thresholds(0.7, 0.6, "f1", "published").or_given(image, pixel) == expected


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        (PUBLISHED_THRESHOLDS, ""),
        (Thresholds(0.999, -1, "f1", "f1"), ""),
        (
            Thresholds(1.5, 0.8, "--image_threshold", "published"),
            "warning: image threshold 1.5 (--image_threshold): scores end at 1, so no picture is an anomaly\n",
        ),
        (
            Thresholds(0.8, 1, "published", "quantile"),
            "warning: pixel threshold 1 (quantile): scores end at 1, so no pixel is marked\n",
        ),
    ],
)
def test_a_threshold_that_nothing_can_be_above_is_said(capsys, thresholds, said):
    thresholds.warn_where_nothing_is_above()
    assert capsys.readouterr().err == said


def test_a_single_picture_has_the_published_line_and_no_sum(tmp_path, capsys):
    with Results([tmp_path / "a.png"], {}, None) as results:
        results.add(tmp_path / "a.png", result(tmp_path / "a.png", 0.614))
    assert capsys.readouterr().out == "Normal - score:  0.614\n"


def test_lines_drawings_json_and_sum_of_several(tmp_path, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    drawings = {path: Places(tmp_path / "out" / f"{path.name}.jpg") for path in paths}
    (tmp_path / "out/b.png.jpg").mkdir(parents=True)  # in the way of its drawing
    with Results(paths, drawings, f"{tmp_path}/new/r.jsonl") as results:
        results.fail(paths[2], UserError("c.png: broken"))  # a batch is read before it is scored
        results.add(paths[0], result(paths[0], 0.9))
        results.add(paths[1], result(paths[1], 0.8))
        results.add(paths[3], result(paths[3], 0.95))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{paths[0]}  Anomaly - score:  0.900",
        f"{paths[1]}  Normal - score:  0.800",
        f"{paths[3]}  Anomaly - score:  0.950",
        "2 of 3 anomalies, 1 could not be read",
    ]
    assert len(err.splitlines()) == 2 and "b.png.jpg: cannot be written" in err
    assert results.errors == 2
    rows = [json.loads(line) for line in (tmp_path / "new/r.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == list(map(str, paths))
    told = {"path": str(paths[0]), "score": 0.9, "label": "Anomaly", "threshold": 0.8}
    assert rows[0] == told | {"pixel_threshold": 0.8, "size": [8, 8], "regions": []}
    assert set(rows[1]) == {*rows[0], "error"} and rows[2] == {"path": str(paths[2]), "error": "c.png: broken"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == ["a.png.jpg", "d.png.jpg"]


def test_what_ends_it_half_way_keeps_the_json_and_tells_no_sum(tmp_path, capsys):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    with pytest.raises(KeyboardInterrupt), Results(paths, {}, f"{tmp_path}/r.jsonl") as results:
        results.add(paths[0], result(paths[0], 0.9))
        raise KeyboardInterrupt
    assert "anomalies" not in capsys.readouterr().out
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_folders_that_cannot_be_made_are_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    a = tmp_path / "a.png"
    for drawings, save_json in (({a: Places(tmp_path / "file/a.jpg")}, None), ({}, f"{tmp_path}/file/r.jsonl")):
        with pytest.raises(UserError, match="file: cannot create this folder"):
            Results([a], drawings, save_json)
