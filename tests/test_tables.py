"""The measured tables in the documentation are those that `python -m benchmarks.tables` makes."""

import json

import pytest

from benchmarks.inputs import ROOT
from benchmarks.tables import BLOCK, PAGES, accuracy, exported, fall, overview, speed, with_tables
from deploy.common.cli import UserError


@pytest.mark.parametrize(("page", "language"), PAGES.items())
def test_the_tables_are_those_of_the_results(page, language):
    tables = {
        "accuracy.md": ["accuracy", "fall", "crops"],
        "benchmarks/README.md": ["speed", "speed_avx2", "exported"],
        "README": ["overview"],
    }
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [match[1] for match in BLOCK.finditer(text)] == next(names for part, names in tables.items() if part in page)
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


def a_run(history, **evaluation):
    evaluation = {"epoch": 5, "image_auroc": 0.75, "pixel_auroc": 0.5, "selection": "last", **evaluation}
    evaluation["backbone"] = {"file": "x.npz"}
    made = {"date": "today", "machine": {"cpu": "a CPU"}, "history": history, "chosen": evaluation, "last": evaluation}
    return {"config": "resnet18", "seed": 3, "epochs": 5, **made}


def test_the_table_of_accuracy_tells_last_highest_and_lowest():
    history = [
        {"epoch": epoch, "image_auroc": image, "pixel_auroc": 0.5}
        for epoch, image in enumerate((0.25, 1.0, None, 0.5, 0.75), start=1)
    ]
    results = {"runs": [a_run(history)], "category": "bottle", "options": ["holdout=0.1"]}
    assert [accuracy(results, language)[0].count(" | ") for language in ("en", "zh")] == [6, 6]
    assert accuracy(results, "en")[0].startswith("| config | seed | epochs |")
    row = accuracy(results, "en")[2]
    expected = (
        "| `resnet18.yaml` | 3 | 5 | 0.7500 / 0.5000 | 1.0000 / 0.5000 | 0.5000 / 0.5000 | epoch 5: 0.7500 / 0.5000 |"
    )
    assert row == expected
    assert accuracy(results, "en")[-1] == (
        "Category bottle, `-o holdout=0.1`; today, a CPU, backbone weights x.npz. "
        "Selection of the checkpoint: resnet18 last."
    )


def test_the_table_of_the_fall_has_every_twentieth_epoch_over_the_seeds():
    def history(shift):
        return [
            {"epoch": float(e), "loss": -e, "val_loss": e, "image_auroc": shift + e / 100, "pixel_auroc": 0.5}
            for e in range(1, 46)
        ]

    runs = [a_run(history(0.0)), a_run(history(0.1)), {**a_run([]), "config": "resnet18_few"}]
    results = {"runs": runs, "category": "crops", "options": []}
    lines = fall(results, "en")
    assert lines[2:4] == [
        "| 20 | -20.00 (-20.00 – -20.00) | 20.00 (20.00 – 20.00) | 0.250 (0.200 – 0.300) | 0.500 (0.500 – 0.500) |",
        "| 40 | -40.00 (-40.00 – -40.00) | 40.00 (40.00 – 40.00) | 0.450 (0.400 – 0.500) | 0.500 (0.500 – 0.500) |",
    ]
    assert lines[4] == ""
    assert lines[5].startswith("`resnet18.yaml`, seeds 3, 3: mean (lowest – highest). Category crops")
    assert fall(results, "zh")[0].startswith("| 轮次 |")


def results_of(keys):
    figures = {key: {"unit": "s", "results": {"ours": {"median": 2.0}}} for key in keys}
    made = {"machine": {"cpu": "a CPU"}, "versions": {"paddlepaddle": "3"}, "threads": 2, "date": "today"}
    return {"figures": figures, **made}


def test_the_table_of_speed_has_what_was_measured_and_dashes():
    results = results_of(["step/cached/8", "epoch", "memory/train.py", "start/infer", "start/paddle"])
    results["figures"]["memory/train.py"]["results"]["ours"]["median"] = 2e9
    results["figures"]["epoch"]["results"]["anomalib"] = {"median": 3.0}
    lines = speed(results, "en")
    assert lines[0] == "|  | ours | anomalib 2.7, width 1.06 |"
    assert lines[2] == "| training step, batch 8, features cached | 2 s | – |"
    assert lines[3] == "| first epoch with evaluation, 209 + 83 pictures | 2 s | 3 s |"
    assert lines[4] == ""
    assert "today, a CPU, 2 threads, PaddlePaddle 3" in lines[5]
    assert "2.00 GB" in lines[6] and "1.00 times as long" in lines[6]


def test_the_table_of_exported_models_leaves_out_what_the_cpu_lacks():
    lines = exported(results_of(["inference/OpenVINO fp32/1", "inference/OpenVINO fp32/8"]), "en")
    assert lines[:5] == [
        "|  | ours |",
        "| :-- | --: |",
        "| OpenVINO, batch 1 | 2 s |",
        "| OpenVINO, batch 8 | 2 s |",
        "",
    ]


def test_the_overview_leaves_out_the_narrower_peer():
    results = results_of(["epoch", "latency"])
    for name, seconds in (("anomalib", 3.0), ("anomalib, ratio 1.0", 2.5)):
        results["figures"]["latency"]["results"][name] = {"median": seconds}
    assert overview(results, "zh")[:5] == [
        "|  | 本仓库 | anomalib 2.7，宽度 1.06 |",
        "| :-- | --: | --: |",
        "| 第一轮训练和评估，209+83 张图片 | 2 s | – |",
        "| 一张图片，训练好的模型 | 2 s | 3 s |",
        "",
    ]
