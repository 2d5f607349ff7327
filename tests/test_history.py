"""Which epoch is best, and what history.csv holds."""

import csv

import pytest

from deploy.cli import UserError
from utils.config import SelectionWeights
from utils.history import EpochRow, best_row, draw_curves, selection_value, write_csv


def rows(*aurocs):
    """A history of (image, pixel) AUROCs, one epoch each; None where it was not evaluated."""
    weights = SelectionWeights()
    return [
        EpochRow(epoch, 1.0 / epoch, 0.001, *pair, selection_value(*pair, weights), 0.1)
        for epoch, pair in enumerate((pair or (None, None) for pair in aurocs), start=1)
    ]


@pytest.mark.parametrize(
    ("image", "pixel", "expected"), [(0.5, 0.9, 0.7), (None, 0.9, 0.9), (0.5, None, 0.5), (None, None, None)]
)
def test_selection_is_the_weighted_sum_of_what_was_measured(image, pixel, expected):
    assert selection_value(image, pixel, SelectionWeights()) == expected


def test_selection_weights_are_used():
    assert selection_value(0.5, 0.9, SelectionWeights(image=1, pixel=0)) == 0.5
    assert selection_value(0.5, 0.9, SelectionWeights(image=1, pixel=3)) == pytest.approx(3.2)


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


@pytest.mark.parametrize("history", [rows((0.5, 0.6), None, (0.7, None)), rows(None), []])
def test_curves_are_a_png_whatever_was_measured(tmp_path, history):
    draw_curves(tmp_path / "curves.png", history, "bottle")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_history_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file"):
        write_csv(tmp_path / "file" / "history.csv", rows((0.5, 0.5)))
