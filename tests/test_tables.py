"""The measured tables in the documentation are those that `python -m benchmarks.tables` makes."""

import json
import re

import pytest

from benchmarks.inputs import ROOT
from benchmarks.tables import BLOCK, PAGES, accuracy, at, exported, fall, overview, speed, subnets, with_tables
from deploy.common.cli import UserError


@pytest.mark.parametrize(("page", "language"), PAGES.items())
def test_the_tables_are_those_of_the_results(page, language):
    tables = {
        "accuracy.md": ["accuracy", "fall"],
        "benchmarks/README.md": ["speed", "speed_avx2", "exported"],
        "README": ["overview"],
        "backbones.md": ["paper", "subnets"],
    }
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [match[1] for match in BLOCK.finditer(text)] == next(names for part, names in tables.items() if part in page)
    assert with_tables(text, language) == text


def three_runs(category, config):
    """Those of the config as it stands, of three seeds."""
    results = json.loads((ROOT / "benchmarks/accuracy.json").read_text(encoding="utf-8"))
    asked = (category, config, [])
    runs = [run for run in results["runs"] if (run["category"], run["config"], run["options"]) == asked]
    assert {run["seed"] for run in runs} == {0, 1, 2}
    return runs


@pytest.mark.parametrize(
    ("category", "config", "image", "pixel"),
    [
        ("bottle", "resnet18_stable", 0.997, 0.975),
        ("bottle", "auto", 0.998, 0.985),
        ("kolektor", "auto", 0.91, 0.91),
        ("screw", "auto", 0.86, None),
    ],
)
def test_a_last_epoch_keeps_its_promise(category, config, image, pixel):
    """With every seed it is good, and in the mean like those at 50% and 75%; never a number from memory."""
    runs = three_runs(category, config)
    for kind, lowest in (("image_auroc", image), ("pixel_auroc", pixel)):
        last = [run["history"][-1][kind] for run in runs]
        if lowest is None:  # there are no masks
            assert set(last) == {None}
            continue
        assert min(last) >= lowest
        for share in (0.5, 0.75):
            means = [sum(at(run["history"], part)[kind] for run in runs) / len(runs) for part in (share, 1)]
            assert abs(means[0] - means[1]) <= 0.015


@pytest.mark.parametrize(
    ("category", "config"),
    [
        ("bottle", "resnet18_stable"),
        ("bottle", "auto"),
        ("kolektor", "auto"),
        pytest.param("screw", "auto", marks=pytest.mark.xfail(strict=True, reason="screw's seeds are 0.028 apart")),
    ],
)
def test_a_last_epoch_is_like_that_of_other_seeds(category, config):
    for kind in ("image_auroc", "pixel_auroc"):
        last = [run["history"][-1][kind] or 0.0 for run in three_runs(category, config)]
        assert max(last) - min(last) <= 0.02


def test_no_path_of_a_machine_is_in_the_results():
    for file in (ROOT / "benchmarks").rglob("*.json"):
        assert not re.search(r'"/\w+/', file.read_text(encoding="utf-8")), file


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match="unknown table height"):
        with_tables("<!-- table: height -->\n<!-- end of table -->", "en")


def a_run(history, seed=3, **values):
    made = {"date": "today", "machine": {"cpu": "a CPU"}, "last": {"backbone": {"file": "x.npz"}}, "pictures": 36}
    asked = {"category": "crops", "config": "resnet18", "options": [], "seed": seed, "epochs": 5, "steps": None}
    return {**asked, **made, "history": history, **values}


def some_history(*image, pixel=0.5, steps=None):
    """An epoch of a minute for each image AUROC."""
    rows = [{"epoch": e, "image_auroc": i, "pixel_auroc": pixel} for e, i in enumerate(image, start=1)]
    for row in rows:
        row.update(seconds=60.0, **({"steps": steps[row["epoch"] - 1]} if steps else {}))
    return rows


def test_the_table_of_accuracy_has_a_row_a_category_and_config():
    runs = [
        a_run(some_history(0.25, 1.0, None, 0.5, 0.75), options=["holdout=0.1"]),
        a_run(some_history(0.25, 1.0, None, 0.5, 0.25), seed=4, options=["holdout=0.1"]),
        a_run(some_history(0.1, 0.2, 0.3, pixel=None, steps=[7, 14, 15]), config="auto", epochs=None, steps=15),
    ]
    lines = accuracy({"runs": runs}, "en")
    assert lines[0].startswith("| category (pictures to learn from) | config | budget | seeds | last epoch: image")
    assert lines[2:4] == [
        "| crops (36), `holdout=0.1` | `resnet18.yaml` | 5 epochs | 2 | 0.500 (0.250 – 0.750) | 0.500 (0.500 – 0.500) "
        "| 1.000 / 0.500 | 0.500 / 0.500 | 5.0 |",
        "| crops (36) | `auto.yaml` | 15 steps | 1 | 0.300 | – | 0.100 / – | 0.200 / – | 3.0 |",
    ]
    assert lines[4:] == ["", "today, a CPU, backbone weights x.npz."]
    assert "| 15 步 | 1 | 0.300 | – |" in accuracy({"runs": runs}, "zh")[3]
    one, two = (a_run(some_history(0.5), options=[f"share_subnet={shared}"]) for shared in (True, False))
    assert accuracy({"runs": [*runs, one, two]}, "en") == lines
    assert [line.split(" | ")[0] for line in subnets({"runs": [*runs, one, two]}, "en")[2:4]] == [
        "| crops (36), `share_subnet=True`",
        "| crops (36), `share_subnet=False`",
    ]


def test_the_table_of_the_fall_has_every_twentieth_epoch_over_the_seeds():
    def history(shift):
        return [
            {"epoch": float(e), "loss": -e, "val_loss": e, "image_auroc": shift + e / 100, "pixel_auroc": 0.5}
            for e in range(1, 46)
        ]

    others = [a_run([], config="resnet18_few"), a_run([], category="bottle")]
    lines = fall({"runs": [a_run(history(0.0)), a_run(history(0.1)), *others]}, "en")
    assert lines[2:4] == [
        "| 20 | -20.00 (-20.00 – -20.00) | 20.00 (20.00 – 20.00) | 0.250 (0.200 – 0.300) | 0.500 (0.500 – 0.500) |",
        "| 40 | -40.00 (-40.00 – -40.00) | 40.00 (40.00 – 40.00) | 0.450 (0.400 – 0.500) | 0.500 (0.500 – 0.500) |",
    ]
    assert lines[4] == ""
    assert lines[5].startswith("`resnet18.yaml`, seeds 3, 3: mean (lowest – highest). today")
    assert fall({"runs": others}, "zh")[0].startswith("| 轮次 |")


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
