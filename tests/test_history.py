"""Which epoch is best, and what history.csv holds."""

import csv
import json
from pathlib import Path

import pytest

from deploy.common.cli import UserError
from utils.config import SelectionWeights, load_config
from utils.history import EpochRow, best_row, draw_curves, epoch_line, finished, selection_value, waited_for, write_csv


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
    ("file", "name", "seed", "best", "last"),
    [
        ("benchmarks/accuracy.json", "resnet18_stable", 0, 23, 40),
        ("benchmarks/accuracy.json", "resnet18_stable", 1, 40, 40),
        ("benchmarks/accuracy.json", "resnet18_stable", 2, 22, 40),
        ("benchmarks/accuracy_crops/accuracy.json", "resnet18", 0, 70, 100),
        ("benchmarks/accuracy_crops/accuracy.json", "resnet18", 1, 50, 80),
    ],
)
def test_best_and_last_epoch_of_measured_histories_are_those_of_the_published_loop(file, name, seed, best, last):
    """The published scripts were run on these histories, with their patience of 30."""
    runs = json.loads(Path(file).read_text())["runs"]
    (run,) = (run for run in runs if (run["config"], run["seed"]) == (name, seed))
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


@pytest.mark.parametrize("history", [rows((0.5, 0.6), None, (0.7, None)), rows(None), []])
def test_curves_are_a_png_whatever_was_measured(tmp_path, history):
    draw_curves(tmp_path / "curves.png", history, "bottle $ \udcff")  # of a name that is no text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_history_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file"):
        write_csv(tmp_path / "file" / "history.csv", rows((0.5, 0.5)))
