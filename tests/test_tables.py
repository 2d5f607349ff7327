"""The measured tables in both READMEs are those that `python -m benchmarks.tables` makes."""

import json

import pytest

from benchmarks.inputs import ROOT
from benchmarks.tables import BLOCK, READMES, accuracy, speed, with_tables
from deploy.cli import UserError


@pytest.mark.parametrize(("name", "language"), READMES.items())
def test_the_tables_are_those_of_the_results(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert {match[1] for match in BLOCK.finditer(text)} == {"speed", "accuracy"}
    assert with_tables(text, language) == text


def test_the_stable_configuration_keeps_its_promise():
    """The last epoch is good, like the best one, and like that of other seeds; never a number from memory."""
    results = json.loads((ROOT / "benchmarks/accuracy.json").read_text(encoding="utf-8"))
    runs = [run for run in results["runs"] if run["config"] == "resnet18_stable"]
    assert {run["seed"] for run in runs} == {0, 1, 2}
    for kind, lowest in (("image_auroc", 0.997), ("pixel_auroc", 0.975)):
        last = [run["history"][-1][kind] for run in runs]
        assert min(last) >= lowest
        assert max(last) - min(last) <= 0.005
        for run in runs:
            assert run["history"][-1][kind] >= max(row[kind] or 0 for row in run["history"]) - 0.005


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match="unknown table height"):
        with_tables("<!-- table: height -->\n<!-- end of table -->", "en")


def test_the_table_of_accuracy_tells_last_highest_and_lowest():
    history = [
        {"epoch": epoch, "image_auroc": image, "pixel_auroc": 0.5}
        for epoch, image in enumerate((0.25, 1.0, None, 0.5, 0.75), start=1)
    ]
    evaluation = {
        "epoch": 5,
        "image_auroc": 0.75,
        "pixel_auroc": 0.5,
        "backbone": {"file": "x.npz"},
        "selection": "last",
    }
    made = {"date": "today", "machine": {"cpu": "a CPU"}}
    runs = [{"config": "resnet18", "seed": 3, **made, "history": history, "chosen": evaluation, "last": evaluation}]
    results = {"runs": runs, "category": "bottle", "epochs": 5}
    assert [accuracy(results, language)[0].count(" | ") for language in ("en", "zh")] == [5, 5]
    assert accuracy(results, "en")[0].startswith("| config | seed |")
    row = accuracy(results, "en")[2]
    expected = (
        "| `resnet18.yaml` | 3 | 0.7500 / 0.5000 | 1.0000 / 0.5000 | 0.5000 / 0.5000 | epoch 5: 0.7500 / 0.5000 |"
    )
    assert row == expected
    assert accuracy(results, "en")[-1].endswith("backbone weights x.npz; selection of the checkpoint: last.")


def test_a_figure_that_a_contender_does_not_have_is_a_dash():
    keys = ["step/cached/8", "step/backbone/8", "step/cached/32", "step/backbone/32", "epoch", "later epoch"]
    keys += ["evaluation/83", "latency", "throughput/8", "memory/train.py", "start/infer", "start/paddle"]
    figures = {key: {"unit": "bytes" if "memory" in key else "s", "results": {"ours": {"median": 2.0}}} for key in keys}
    results = {
        "figures": figures,
        "machine": {"cpu": "a CPU"},
        "versions": {"paddlepaddle": "3"},
        "threads": 2,
        "date": "",
    }
    assert speed(results, "en")[2] == "| training step, batch 8, features cached | 2 s | – | – | – | – |"
