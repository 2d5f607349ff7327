"""What eval.py prints and leaves behind."""

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from datasets.mvtec import GroundTruth
from deploy.common.decisions import PUBLISHED_THRESHOLDS
from deploy.common.imaging import read_rgb
from utils.evaluation import Scores, measure_all
from utils.report import csv_table, draw_evaluation, markdown_table, means, print_results, save_maps, write_results
from utils.results import UNSTATED


def row(**changes):
    """A category's entry in eval.json."""
    figures = dict.fromkeys(("pixel_auroc", "image_auroc", "image_ap", "pixel_ap"), 1 / 3)
    figures |= dict.fromkeys(("image_f1_max", "pixel_f1_max", "aupro"), 2 / 3)
    figures |= {"image_f1_threshold": 0.7, "pixel_f1_threshold": 0.6}
    origin = {"selection": "test_auroc", "checkpoint": "results/exp/part/best.pdparams", "epoch": 9}
    pictures = {"images": 10, "anomalous_images": 6, "images_with_mask": 6}
    return {**figures, **origin, "backbone": UNSTATED, **pictures, **changes}


def test_the_mean_leaves_out_what_was_not_measured():
    mean = means({"a": row(image_auroc=0.5), "b": row(image_auroc=1.0, aupro=None), "c": {"image_auroc": None}})
    assert mean["image_auroc"] == 0.75
    assert mean["aupro"] == 2 / 3
    assert means({"a": {}})["pixel_ap"] is None
    assert not any("threshold" in key for key in mean)


# ---- the printed table


def test_the_published_lines_come_last_and_the_other_figures_on_demand(capsys):
    rows = {"a longer name": row(), "b": row(aupro=None)}
    print_results(rows, False)
    *before, first, second, mean = capsys.readouterr().out.splitlines()
    assert first == "a longer name    pixel auroc:0.333   image auroc:0.333"
    assert second == "b                pixel auroc:0.333   image auroc:0.333"
    assert mean == "all              pixel auroc:0.333   image auroc:0.333"
    assert "selection: test_auroc (best checkpoint chosen on the test set)" in before
    assert "epoch: a longer name 9, b 9" in before
    print_results(rows, True)
    *beginning, title, first, second, mean, _, _, _ = capsys.readouterr().out.splitlines()
    assert beginning == before
    assert title.startswith("category       pixel auroc  image auroc  image ap")
    assert mean.split() == ["mean", "0.333", "0.333", "0.333", "0.333", "0.667", "0.667", "0.667"]
    assert second.split()[-1] == "n/a"
    assert len(title) == len(first) == len(second)


def test_all_is_the_mean_of_what_is_printed(capsys):
    """The mean of the whole figures would be 0.9987."""
    aurocs = {"a": 0.9984, "b": 0.9984, "c": 0.9994}
    print_results({name: row(image_auroc=value, pixel_auroc=None) for name, value in aurocs.items()}, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "c                pixel auroc:n/a   image auroc:0.999",
        "all              pixel auroc:n/a   image auroc:0.998",
    ]


def test_the_epoch_of_a_published_file_is_shown_as_what_it_is(capsys):
    print_results({"a": row(epoch=20, epoch_in_file=19), "b": row(epoch=20, epoch_in_file=20)}, False)
    epochs = "epoch: a 20 (19 in the published file, which counts from 0), b 20"
    assert epochs in capsys.readouterr().out.splitlines()


# ---- eval.json, eval.csv, eval.md


def test_csv_has_full_precision_and_the_published_means():
    rows = {"a, b": row(aupro=None), "c": {"pixel_auroc": 0.5}}
    first, second, *rest = csv.DictReader(io.StringIO(csv_table(rows)))
    assert first["category"] == "a, b"
    assert float(first["pixel_auroc"]) == 1 / 3
    assert first["aupro"] == ""
    assert (first["selection"], first["epoch"], first["images"]) == ("test_auroc", "9", "10")
    assert second["pixel_auroc"] == "0.5"
    assert second["selection"] == second["backbone"] == ""
    assert [(r["category"], float(r["image_auroc"])) for r in rest] == [
        ("mean", 1 / 3),
        ("published reproduction", 0.98),
        ("paper", 0.979),
    ]


def test_markdown_compares_with_the_published_means_and_says_what_they_are():
    text = markdown_table("exp", {"bottle": row(), "a|b": row(pixel_auroc=None)})
    assert "| bottle | 33.33 | 33.33 |" in text
    assert r"| a\|b | n/a |" in text
    assert "| **mean of 2 categories** | 33.33 | 33.33 |" in text
    assert "| published reproduction, 15 categories | 97.2 | 98.0 | n/a |" in text
    assert "| paper, 15 categories | 97.2 | 97.9 | n/a |" in text
    assert "The mean here is over 2 categories" in text
    assert "published best checkpoint was chosen on the test set" in text
    lines = [line.count("|") for line in text.replace(r"\|", "").splitlines() if line.startswith("|")]
    assert set(lines) == {9}
    for line in (
        "* backbone weights: not stated in the checkpoint",
        "* selection: test_auroc (best checkpoint chosen on the test set)",
        "* checkpoint: best.pdparams",
        "* epoch: bottle 9, a|b 9",
        "* test pictures: 20, 12 of them with a defect",
    ):
        assert line in text.splitlines()


def test_where_the_categories_differ_the_foot_says_which():
    rows = {"a": row(), "b": row(selection="last", checkpoint="results/exp/b/last.pdparams", epoch=40), "c": row()}
    text = markdown_table("exp", rows)
    assert "* selection: test_auroc (best checkpoint chosen on the test set) (a, c)\n* selection: last" in text
    assert "* checkpoint: last.pdparams (b)" in text
    older = {key: value for key, value in row().items() if key != "selection"}
    assert "* selection: not stated (b)" in markdown_table("exp", {"a": row(), "b": older})


def test_results_of_other_categories_stay(tmp_path, capsys):
    write_results(tmp_path, {"a": row(image_auroc=0.5)})
    write_results(tmp_path, {"b": row(image_auroc=1.0)})
    content = json.loads((tmp_path / "eval.json").read_text())
    assert list(content["categories"]) == ["a", "b"]
    assert content["categories"]["a"] == row(image_auroc=0.5)
    assert content["mean"]["image_auroc"] == 0.75
    assert "\na," in (tmp_path / "eval.csv").read_text()
    assert "\n| a |" in (tmp_path / "eval.md").read_text()
    assert not capsys.readouterr().err


def test_of_evaluations_at_once_none_loses_its_rows(tmp_path):
    names = [f"category {i}" for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: write_results(tmp_path, {name: row()}), names))
    assert sorted(json.loads((tmp_path / "eval.json").read_text())["categories"]) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.csv", "eval.json", "eval.md"]


@pytest.mark.parametrize("content", ["", "[]", '{"categories": []}', '{"categories": {"a": {"aupro": "high"}}}'])
def test_a_damaged_result_is_written_anew_with_a_warning(tmp_path, capsys, content):
    (tmp_path / "eval.json").write_text(content)
    write_results(tmp_path, {"b": row()})
    assert list(json.loads((tmp_path / "eval.json").read_text())["categories"]) == ["b"]
    assert "damaged" in capsys.readouterr().err


# ---- pictures and maps


@pytest.fixture
def measured(tmp_path):
    """Two good and two defect pictures, each of a colour of its own, wider than high."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (60, 40), colour).save(path)
    random = np.random.default_rng(0)
    masks = np.zeros((4, 4, 6), bool)
    masks[2:, 1:3, 2:4] = True
    maps = np.float32(random.random(masks.shape) / 2 + 0.4 * masks)
    scores = Scores(np.float32([0.3, 0.6, 0.5, 0.9]), maps)
    return paths, scores, GroundTruth(masks.any(axis=(1, 2)), masks)


def draw(folder, paths, scores, truth):
    draw_evaluation(folder, paths, scores, truth, measure_all(scores, truth), PUBLISHED_THRESHOLDS)
    return {path.name for path in folder.iterdir()}


def colour_of(path):
    """Of the first panel's middle."""
    picture = read_rgb(path)
    return tuple(int(round(channel, -1)) for channel in picture[40 + 100, 100].astype(int))


NAMES = {"roc.png", "scores.png", "worst_false_positive.jpg", "worst_false_negative.jpg"}


def test_the_pictures_are_those_of_the_worst(tmp_path, measured):
    folder = tmp_path / "evaluation"
    assert draw(folder, *measured) == NAMES
    assert colour_of(folder / "worst_false_positive.jpg") == pytest.approx((0, 250, 0), abs=10)  # good, score 0.6
    assert colour_of(folder / "worst_false_negative.jpg") == pytest.approx((0, 0, 250), abs=10)  # defect, score 0.5
    for name in ("roc.png", "scores.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        (slice(0, 2), {"scores.png", "worst_false_positive.jpg"}),
        (slice(2, 4), {"roc.png", "scores.png", "worst_false_negative.jpg"}),  # their pixels have a curve
        (slice(0, 0), set()),
    ],
    ids=["no defects", "no good", "nothing"],
)
def test_pictures_without_content_are_removed(tmp_path, measured, kept, names):
    paths, scores, truth = measured
    folder = tmp_path / "evaluation"
    draw(folder, *measured)
    fewer = Scores(scores.image[kept], scores.pixel[kept]), GroundTruth(truth.labels[kept], truth.masks[kept])
    assert draw(folder, paths[kept], *fewer) == names


def test_equal_scores_and_missing_masks_can_be_drawn(tmp_path, measured):
    paths, scores, truth = measured
    equal = Scores(np.full(4, 0.5, np.float32), scores.pixel)
    assert draw(tmp_path / "evaluation", paths, equal, GroundTruth(truth.labels, None)) == NAMES


def test_maps_hold_all_that_the_figures_are_made_of(tmp_path, measured):
    paths, scores, truth = measured
    save_maps(tmp_path / "maps.npz", *measured)
    with np.load(tmp_path / "maps.npz") as maps:  # no pickle in it
        again = Scores(maps["image_scores"], maps["smoothed"]), GroundTruth(maps["labels"], maps["masks"])
        assert maps["paths"].tolist() == [str(path) for path in paths]
    assert measure_all(*again) == measure_all(scores, truth)
    save_maps(tmp_path / "maps.npz", paths, scores, GroundTruth(truth.labels, None))
    with np.load(tmp_path / "maps.npz") as maps:
        assert set(maps) == {"smoothed", "image_scores", "labels", "paths"}
