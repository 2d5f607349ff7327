"""Which epoch is best, what history.csv holds and what curves.png shows."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import utils.history
from deploy.common.cli import UserError
from deploy.common.imaging import read_rgb
from utils.config import SelectionWeights, load_config
from utils.history import (
    EpochRow,
    best_row,
    draw_curves,
    epoch_line,
    finished,
    is_evaluated,
    selection_value,
    shown_range,
    waited_for,
    write_csv,
)


def config(**changes):
    return load_config("configs/resnet18.yaml", **changes)


def rows(*aurocs):
    """A history of (image, pixel) AUROCs, one epoch each; None where it was not evaluated."""
    return [
        EpochRow(epoch, 1.0 / epoch, 0.001, *pair, selection_value(config(), *pair, None), 0.1)
        for epoch, pair in enumerate((pair or (None, None) for pair in aurocs), start=1)
    ]


@pytest.mark.parametrize(
    ("image", "pixel", "expected"), [(0.5, 0.9, 0.7), (None, 0.9, 0.9), (0.5, None, 0.5), (None, None, None)]
)
def test_selection_is_the_weighted_sum_of_what_was_measured(image, pixel, expected):
    assert selection_value(config(), image, pixel, 0.25) == expected


def test_selection_sees_three_decimals():
    assert selection_value(config(), 0.98149, 0.97951, None) == 0.5 * 0.981 + 0.5 * 0.98
    assert selection_value(config(), 0.9525, None, None) == 0.952  # numpy rounds 952.5 to even


@pytest.mark.parametrize(
    ("category", "name", "seed", "best", "last"),
    [
        ("bottle", "resnet18_stable", 0, 23, 40),
        ("bottle", "resnet18_stable", 1, 40, 40),
        ("bottle", "resnet18_stable", 2, 22, 40),
        ("crops", "resnet18", 0, 70, 100),
        ("crops", "resnet18", 1, 50, 80),
    ],
)
def test_best_and_last_epoch_of_measured_histories_are_those_of_the_published_loop(category, name, seed, best, last):
    """The published scripts were run on these histories, with their patience of 30."""
    runs = json.loads(Path("benchmarks/accuracy.json").read_text())["runs"]
    (run,) = (run for run in runs if (run["category"], run["config"], run["seed"]) == (category, name, seed))
    history = []
    for row in rows(*((row["image_auroc"], row["pixel_auroc"]) for row in run["history"])):
        history.append(row)
        if finished(history, config(epochs=len(run["history"]))):
            break
    assert (best_row(history).epoch, len(history)) == (best, last)


def test_selection_weights_are_used():
    weighted = [config(selection_weights={"image": 1, "pixel": pixel}) for pixel in (0, 3)]
    assert [c.selection_weights for c in weighted] == [SelectionWeights(1.0, 0.0), SelectionWeights(1.0, 3.0)]
    assert selection_value(weighted[0], 0.5, 0.9, None) == 0.5
    assert selection_value(weighted[1], 0.5, 0.9, None) == pytest.approx(3.2)


def history_under(selection, *measured):
    """A history of (image AUROC, held-out loss), one epoch each."""
    chosen = config(selection=selection, holdout=0.1)
    return [
        EpochRow(epoch, 1.0, 0.001, auroc, auroc, selection_value(chosen, auroc, auroc, loss), 0.1, loss)
        for epoch, (auroc, loss) in enumerate(measured, start=1)
    ]


def test_val_likelihood_chooses_the_lowest_held_out_loss_whatever_the_aurocs():
    history = history_under("val_likelihood", (0.9, 0.5), (0.7, -0.25), (0.8, 0.0), (1.0, None))
    assert best_row(history).epoch == 2
    assert waited_for(history[:3]) == 1


def test_last_chooses_the_last_epoch_and_never_waits():
    history = history_under("last", (0.9, 0.5), (0.7, 0.6))
    assert best_row(history).epoch == 2
    assert best_row(history[:1]).epoch == 1
    assert waited_for(history) == 0


def test_finished_after_all_epochs_or_without_patience():
    history = rows((0.9, 0.9), (0.8, 0.8), (0.7, 0.7))
    assert not finished([], config(epochs=1))
    assert not finished(history, config(epochs=4, patience=3))
    assert finished(history, config(epochs=3, patience=3))
    assert finished(history, config(epochs=4, patience=2))


def test_finished_when_the_steps_are_done_however_many_epochs_they_took():
    counted = [dataclasses.replace(row, steps=steps) for row, steps in zip(rows(None, None), (3, 5), strict=True)]
    assert not finished([], config(steps=5))
    assert not finished(counted[:1], config(steps=5))
    assert not finished(counted, config(steps=6))
    assert finished(counted, config(steps=5))
    assert not finished(rows(None, None), config(steps=1))  # of a version that counted none


@pytest.mark.parametrize(
    ("interval", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (1000, [5]), (-1, [])]
)
def test_every_so_many_epochs_are_evaluated_and_the_last_one(interval, evaluated):
    chosen = config(eval_interval=interval)
    assert [epoch for epoch in range(1, 6) if is_evaluated(epoch, 5, chosen)] == evaluated


def test_the_log_line_says_what_was_measured():
    history = history_under("val_likelihood", (0.9, 0.5), (None, -0.25))
    assert epoch_line(history[:1]) == (
        "Epoch 1 - loss = 1.000 - held-out loss = 0.500 - pixel auroc: 0.900 - image auroc: 0.900 - best epoch: 1 - "
        "0.1 sec"
    )
    assert epoch_line(history) == "Epoch 2 - loss = 1.000 - held-out loss = -0.250 - best epoch: 2 - 0.1 sec"


@pytest.mark.parametrize(
    ("aurocs", "epoch"),
    [
        pytest.param([(0.5, 0.5), (0.75, 0.75), (0.5, 0.75)], 2, id="highest"),
        pytest.param([(0.5, 0.5), (0.5, 0.5)], 2, id="all equal: the later"),
        pytest.param([(0.5, 0.75), (0.75, 0.5)], 1, id="tie: not if its pixel AUROC is lower"),
        pytest.param([(0.75, 0.5), (0.5, 0.75)], 2, id="tie: if its pixel AUROC is higher"),
        pytest.param([(0.5, 0.5), None, None], 1, id="epochs without evaluation"),
        pytest.param([None, (0.0, 0.0), None], 2, id="a measured 0 counts"),
        pytest.param([(0.5, None), (0.75, None), (0.25, None)], 2, id="no masks"),
        pytest.param([None, None], 2, id="nothing measured: the last"),
    ],
)
def test_best_epoch(aurocs, epoch):
    assert best_row(rows(*aurocs)).epoch == epoch


def test_an_empty_history_has_no_best_epoch():
    assert best_row([]) is None


def test_csv_keeps_full_precision_and_leaves_empty_what_was_not_measured(tmp_path):
    history = rows((1 / 3, 0.1 + 0.2), None)
    write_csv(tmp_path / "history.csv", history)
    with open(tmp_path / "history.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["image_auroc"]) == 1 / 3
    assert float(first["pixel_auroc"]) == 0.1 + 0.2
    assert float(second["loss"]) == 0.5
    assert second["image_auroc"] == second["pixel_auroc"] == second["selection"] == ""
    assert [first["epoch"], second["epoch"]] == ["1", "2"]


# ---- curves.png


@pytest.mark.parametrize(
    ("history", "panels"),
    [
        (rows((0.5, 0.6), None, (0.7, None)), 2),
        (rows((0.5, 0.6)), 2),
        (rows(None), 1),
        ([EpochRow(1, math.nan, 0.1, None, None, None, 1.0)], 1),
    ],
)
def test_curves_have_a_panel_for_what_was_measured(tmp_path, history, panels):
    draw_curves(tmp_path / "curves.png", history, "bottle $")
    assert read_rgb(tmp_path / "curves.png").shape == (450, 500 * panels, 3)


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("bottle $x$", "bottle $x$: loss"),
        ("Flächen 7", "Flächen 7: loss"),
        ("x" * 60, f"{'x' * 48}\n{'x' * 12}: loss"),
        ("瓶子", "loss"),
        ("bottle \udcff", "loss"),  # of a name that is no text
    ],
)
def test_the_titles_name_the_category_if_the_font_can(tmp_path, drawn, recwarn, name, heading):
    assert drawn(rows(None), tmp_path, name)[0].get_title() == heading
    assert not recwarn


def test_without_an_epoch_there_are_no_curves(tmp_path):
    draw_curves(tmp_path / "curves.png", rows(None), "bottle")
    draw_curves(tmp_path / "curves.png", [], "bottle")  # interrupted in the first epoch
    assert not list(tmp_path.iterdir())


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last curves, without a file."""
    figures = []
    monkeypatch.setattr(utils.history, "write_figure", lambda path, figure: figures.append(figure))

    def draw(history, path, name="bottle"):
        draw_curves(path / "curves.png", history, name)
        figures[-1].canvas.draw()
        return figures[-1].axes

    return draw


@pytest.mark.parametrize("epochs", [1, 2, 3, 40, 500])
def test_epochs_are_whole_and_all_in_the_picture(tmp_path, drawn, epochs):
    history = [EpochRow(epoch, 1 / epoch, 0.001, 0.5, 0.5, 0.5, 0.1) for epoch in range(1, epochs + 1)]
    for axes in drawn(history, tmp_path):
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown and all(tick == int(tick) and 1 <= tick <= epochs for tick in shown)
        assert low < 1 and high > epochs


def test_legends_hide_no_curve_and_tell_of_what_is_outside(tmp_path, drawn):
    for axes in drawn(rows((0.4, 0.5), *[(0.98, 0.97)] * 9), tmp_path):
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "image AUROC (1 of 10 outside, to 0.4)"


def falling(epochs):
    """A loss that begins high above the rest."""
    return 6 * np.exp(-np.arange(epochs) / 1.5) - 3 + np.linspace(1, 0, epochs)


@pytest.mark.parametrize("epochs", [3, 10, 40, 500])
def test_the_first_epoch_does_not_flatten_the_rest(epochs):
    losses = falling(epochs)
    low, high = shown_range([losses], True)
    assert losses[0] > high
    assert np.ptp(losses[epochs // 2 :]) > 0.12 * (high - low)
    assert ((low < losses) & (losses < high)).sum() >= 0.6 * epochs


def test_what_does_not_flatten_the_rest_is_shown_from_the_first_epoch():
    for losses in (np.linspace(3, 2, 20), np.array([3.0, 2.0]), np.array([3.0]), np.ones(5)):
        low, high = shown_range([losses], True)
        assert low < losses.min() and losses.max() < high
        assert high - low > 0.0099


def test_a_training_that_diverges_late_does_not_flatten_what_it_did_before():
    losses = np.concatenate([falling(30), 10.0 ** np.arange(1, 11)])
    low, high = shown_range([losses], True)
    assert high < 10
    losses[-1] = np.inf
    assert shown_range([losses], True) == pytest.approx((low, high))


def test_a_training_that_diverges_from_the_beginning_is_shown():
    losses = 1 + np.arange(30.0) ** 2
    low, high = shown_range([losses], True)
    assert ((low < losses) & (losses < high)).mean() > 0.9


def test_curves_far_from_each_other_are_both_shown():
    low, high = shown_range([np.full(9, 0.99), np.array([0.5])], False)
    assert low < 0.5 and high > 0.99


def test_history_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file"):
        write_csv(tmp_path / "file" / "history.csv", rows((0.5, 0.5)))
