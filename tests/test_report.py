"""What eval.py prints and leaves behind."""

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import utils.report
from datasets.mvtec import GroundTruth, load_category, load_ground_truth
from deploy.common.decisions import PUBLISHED_THRESHOLDS
from deploy.common.imaging import TRUE, read_rgb
from utils.evaluation import Scores, measure, measure_all, measure_defects
from utils.metrics import aupro
from utils.report import (
    BY_DEFECT,
    csv_table,
    draw_evaluation,
    markdown_table,
    means,
    print_results,
    save_maps,
    write_results,
)
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


# ---- figures by defect


TEST = [SimpleNamespace(defect=name) for name in (None, None, "crack", "crack", "hole|1", "hole|1")]


@pytest.fixture
def defects():
    """Two good pictures, and two of each defect: scores and ground truth."""
    masks = np.zeros((6, 20, 20), bool)
    masks[2:4, 2:6, 2:6] = masks[4:, 10:14, 3:9] = True
    pixel = np.random.default_rng(0).random(masks.shape).astype(np.float32) + masks / np.float32(3)
    image = np.float32([0.3, 0.6, 0.5, 0.9, 0.7, 0.95])
    return Scores(image, pixel), GroundTruth(masks.any(axis=(1, 2)), masks)


def only(of, scores, truth):
    """Those pictures, as a set of their own."""
    masks = None if truth.masks is None else truth.masks[of]
    return Scores(scores.image[of], scores.pixel[of]), GroundTruth(truth.labels[of], masks)


def test_a_defect_has_the_figures_of_a_test_set_without_the_others(defects, config):
    rows = measure_defects(*defects, TEST, config, 0.6)
    assert list(rows) == ["crack", "hole|1"]
    for name, of in (("crack", [0, 1, 2, 3]), ("hole|1", [0, 1, 4, 5])):
        scores, truth = only(of, *defects)
        row = rows[name]
        assert (row["image_auroc"], row["pixel_auroc"]) == measure(scores, truth)
        assert row["aupro"] == pytest.approx(aupro(scores.pixel, truth.masks), abs=1e-12)
    assert (rows["crack"]["missed_defects"], rows["crack"]["defect_test_pictures"]) == (1, 2)
    assert (rows["hole|1"]["missed_defects"], rows["hole|1"]["defect_test_pictures"]) == (0, 2)
    assert json.loads(json.dumps(rows)) == rows


def with_defects(measured, of=range(6)):
    """An entry of eval.json with the figures by defect, for those pictures."""
    figures = measure_defects(*only(list(of), *measured), [TEST[i] for i in of], None, 0.6)
    return row(decisions={"rule": "f1", "image": 0.6, "pixel": 0.5}, defects=figures)


def test_figures_by_defect_are_printed_before_the_published_lines(defects, capsys):
    rows = {"part": with_defects(defects), "other": row()}
    print_results(rows, True)
    *_, title, crack, hole, note, first, _, _ = capsys.readouterr().out.splitlines()
    assert title.split("  ") == ["category", "defect", "pixel auroc", "image auroc", "aupro", "missed"]
    figures = rows["part"]["defects"]["crack"]
    assert crack.split() == ["part", "crack", *(f"{figures[key]:.3f}" for key in BY_DEFECT), "1", "of", "2"]
    assert hole.split()[:2] == ["part", "hole|1"]
    assert len(title) == len(crack) == len(hole)
    assert note == "missed: not above the image threshold 0.600 (f1)"
    assert first.startswith("part             pixel auroc:")
    print_results(rows, False)
    assert "crack" not in capsys.readouterr().out


def test_eval_md_and_json_have_the_figures_by_defect(defects, tmp_path, capsys):
    rows = {"part": with_defects(defects), "other": row()}
    write_results(tmp_path, rows)
    text = (tmp_path / "eval.md").read_text()
    crack = rows["part"]["defects"]["crack"]
    assert f"| part | crack | {' | '.join(f'{100 * crack[key]:.2f}' for key in BY_DEFECT)} | 1 of 2 |" in text
    assert r"| part | hole\|1 |" in text
    assert "* missed: not above the image threshold 0.600 (f1)\n" in text
    assert "n/a" not in text.split("## By defect")[1]
    assert json.loads((tmp_path / "eval.json").read_text())["categories"]["part"] == rows["part"]
    assert len((tmp_path / "eval.csv").read_text().splitlines()) == 6  # no line by defect
    write_results(tmp_path, {"other": row()})
    assert text == (tmp_path / "eval.md").read_text()
    assert "## By defect" not in markdown_table("exp", {"other": row()})
    assert not capsys.readouterr().err


def test_without_good_pictures_it_is_said_once_why_figures_by_defect_are_missing(defects):
    entry = with_defects(defects, range(2, 6))
    for figures in entry["defects"].values():
        assert [key for key in figures if figures[key] is None] == ["image_auroc"]
    notes = markdown_table("exp", {"part": entry}).split("## By defect")[1]
    assert "* image auroc n/a: no good picture to compare with: part\n" in notes
    assert notes.count("n/a") == 2 + 1


@pytest.mark.parametrize("counts", [True, False], ids=["half", "published"])
def test_a_defect_of_which_no_mask_is_left_is_explained(defects, counts):
    scores, truth = defects
    truth.masks[4:] = False
    entry = with_defects((scores, GroundTruth(np.array([False, False, True, True, counts, counts]), truth.masks)))
    hole = entry["defects"]["hole|1"]
    assert hole["pixel_auroc"] is hole["aupro"] is None
    assert (hole["image_auroc"] is not None, hole["defect_test_pictures"]) == (counts, 2 * counts)
    assert None not in entry["defects"]["crack"].values()
    text = markdown_table("exp", {"part": entry})
    assert "* n/a: no pixel of the defect is left of any of its masks (mask_rule): part/hole|1\n" in text


@pytest.mark.parametrize("without", [["crack"], ["crack", "hole"]])
def test_defects_with_masks_have_pixel_figures_whatever_the_others_have(tmp_path, config, without):
    folder = tmp_path / "part"
    for name in ("train/good", "test/good", "test/crack", "test/hole"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    for name in {"crack", "hole"} - set(without):
        (folder / "ground_truth" / name).mkdir(parents=True)
        mask = Image.new("L", (8, 8))
        mask.paste(255, (0, 0, 4, 4))
        mask.save(folder / "ground_truth" / name / "0_mask.png")
    test = load_category(tmp_path, "part").test
    config = replace(config, input_size=8)
    truth = load_ground_truth(test, config.size, config.mask_rule)
    assert truth.masks is None
    pixel = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    figures = measure_defects(Scores(pixel.max(axis=(1, 2)), pixel), truth, test, config, 0.5)
    for name, row_of in figures.items():
        missing = [key for key in row_of if row_of[key] is None]
        assert missing == (["pixel_auroc", "aupro"] if name in without else [])
    entry = row(decisions={"rule": "f1", "image": 0.6, "pixel": 0.5}, defects=figures)
    notes = markdown_table("exp", {"part": entry}).split("## By defect")[1]
    assert f"* pixel auroc and aupro n/a: no masks: part{'/crack' if len(without) == 1 else ''}\n" in notes
    assert "* n/a" not in notes


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
    return tuple(int(round(channel, -1)) for channel in picture[len(picture) // 2, picture.shape[1] // 6].astype(int))


NAMES = {"roc.png", "scores.png", "highest_good.jpg", "lowest_defect.jpg"}


def test_the_pictures_are_the_highest_good_and_the_lowest_defect(tmp_path, measured):
    folder = tmp_path / "evaluation"
    assert draw(folder, *measured) == NAMES
    assert colour_of(folder / "highest_good.jpg") == pytest.approx((0, 250, 0), abs=10)  # good, score 0.6
    assert colour_of(folder / "lowest_defect.jpg") == pytest.approx((0, 0, 250), abs=10)  # defect, score 0.5
    for name in ("roc.png", "scores.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        (slice(0, 2), {"scores.png", "highest_good.jpg"}),
        (slice(2, 4), {"roc.png", "scores.png", "lowest_defect.jpg"}),  # their pixels have a curve
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


def test_pictures_of_earlier_names_are_removed(tmp_path, measured):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name in ("worst_false_positive.jpg", "worst_false_negative.jpg"):
        (folder / name).touch()
    assert draw(folder, *measured) == NAMES


def test_the_true_mask_is_outlined_where_there_is_one(tmp_path, measured):
    folder = tmp_path / "evaluation"
    draw(folder, *measured)

    def outlined(name):
        return (np.abs(read_rgb(folder / name) - np.array(TRUE)).max(axis=2) < 60).any()

    assert outlined("lowest_defect.jpg")
    assert not outlined("highest_good.jpg")
    paths, scores, truth = measured
    draw(folder, paths, scores, GroundTruth(truth.labels, None))
    assert not outlined("lowest_defect.jpg")


def test_the_legend_of_the_scores_is_beside_them(tmp_path, measured, monkeypatch):
    figures = []
    monkeypatch.setattr(utils.report, "write_figure", lambda path, figure: figures.append(figure))
    utils.report.draw_scores(tmp_path / "scores.png", *measured[1:], PUBLISHED_THRESHOLDS)
    (figure,) = figures
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x0 > figure.axes[0].get_window_extent().x1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "good: 2 pictures",
        "defect: 2 pictures",
        "threshold 0.800 (published)",
    ]


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
