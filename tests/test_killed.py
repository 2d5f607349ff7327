"""Nothing is lost: kill -9 at random moments, two trainings in one folder, a full disk."""

import csv
import json
import os
import random
import re
import resource
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.cli import UserError
from deploy.infer import read_description
from tests.killing import start
from utils.checkpoint import load_checkpoint
from utils.history import EpochRow, best_row
from utils.thresholds import load_thresholds

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--data", str(ROOT / "lite_data"), "-cat", "bottle", "--exp_dir", "exp"]
TINY = ["-o", "input_size=32", "-o", "flow_step=1", "-o", "pretrained=offline", "--batch_size", "12"]
# What chooses the best epoch: the test set; the last one, with a moving average and held-out pictures.
BY_TEST_SET = ["-cfg", str(ROOT / "configs/resnet18.yaml"), "-o", "input_size=32", "-o", "flow_step=1"]
STABLE = ["-cfg", str(ROOT / "configs/resnet18_stable.yaml"), "-o", "input_size=32", "-o", "flow_step=1"]
OFFLINE = ["-o", "pretrained=offline", "--batch_size", "12"]
CHECKPOINTS = ("best.pdparams", "last.pdparams")
FOLDER = Path("results/exp/bottle")


def finish(folder, module, *options, **hazards):
    """Run a command to its end; return its exit code and what it has said."""
    process = start(module, [str(option) for option in options], folder, **hazards)
    process.join(200)
    return process.exitcode, (folder / "output.txt").read_text()


def kill_after(seconds, folder, module, *options):
    """Start a command and kill it after a while; whether it was still at work."""
    process = start(module, [str(option) for option in options], folder)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0


def table(folder):
    """The rows of history.csv, as the dictionaries that checkpoints hold."""
    with open(folder / FOLDER / "history.csv", newline="") as file:
        return [{key: float(text) if text else None for key, text in row.items()} for row in csv.DictReader(file)]


def assert_begins(whole, history):
    """The history is that of an uninterrupted training up to some epoch; only the seconds may differ."""
    assert len(history) <= len(whole)
    for row, expected in zip(history, whole, strict=False):
        for key in set(expected) - {"seconds"}:
            assert (row[key] is None) == (expected[key] is None), key
            if row[key] is not None:
                assert row[key] == pytest.approx(expected[key], rel=1e-6), key


def unfinished(folder):
    """Files that a killed process has left."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def assert_usable(folder, whole):
    """What a killed training has left can be read, and belongs together."""
    folder = folder / FOLDER
    if not (folder / "last.pdparams").exists():
        return
    last = load_checkpoint(folder / "last.pdparams")
    assert_begins(whole, last["history"])
    assert len(last["history"]) == last["epoch"]
    history = [EpochRow(**row) for row in last["history"]]
    if (folder / "best.pdparams").exists():
        best = load_checkpoint(folder / "best.pdparams")
        assert_begins(whole, best["history"])
        assert best["epoch"] == best_row(history).epoch or best_row(history) is history[-1]
    else:
        assert best_row(history) is history[-1]
    if (folder / "history.csv").exists():
        assert_begins(whole, table(folder.parents[2]))
    targets = (*CHECKPOINTS, "history.csv", "config.yaml", "curves.png")
    assert {path.name for path in unfinished(folder)} <= {f".{name.replace('.', '.part.')}" for name in targets}


def assert_same_training(one, other):
    """Checkpoints and history are alike in all but the seconds."""
    assert len(table(one)) == len(table(other))
    assert_begins(table(one), table(other))
    for name in CHECKPOINTS:
        expected, actual = (load_checkpoint(folder / FOLDER / name) for folder in (one, other))
        assert actual["epoch"] == expected["epoch"], name
        for part in ("model_state_dict", "optimizer_state_dict"):
            assert actual[part].keys() == expected[part].keys()
            for key, value in expected[part].items():
                np.testing.assert_allclose(actual[part][key], value, rtol=1e-5, atol=1e-7, err_msg=f"{name} {key}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Uninterrupted trainings by their options: the folder and the seconds that the start and an epoch take."""
    known = {}
    finish(tmp_path_factory.mktemp("help"), "train", "--help")  # starts the server that forks

    def train(options):
        key = " ".join(options)
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            begun = time.perf_counter()
            code, output = finish(folder, "train", *options, *OFFLINE, *DATA)
            seconds = time.perf_counter() - begun
            assert code == 0, output
            spent = [row["seconds"] for row in table(folder)]
            known[key] = folder, seconds - sum(spent), statistics.median(spent)
        return known[key]

    return train


TRAININGS = {
    "test_auroc": ([*BY_TEST_SET, "--epochs", "16", "-o", "patience=5", "-o", "lr=0.02"], 20),
    "moving average": ([*STABLE, "--epochs", "10"], 15),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_killed_again_and_again_goes_on_to_the_same_end(tmp_path, trained, name):
    options, kills = TRAININGS[name]
    whole, to_start, an_epoch = trained(options)
    expected = table(whole)
    chance = random.Random(name)
    killed = 0
    last = tmp_path / FOLDER / "last.pdparams"
    while killed < kills:
        resume = ["--resume"] if last.exists() and load_checkpoint(last)["epoch"] < len(expected) else []
        seconds = chance.uniform(0, to_start + 2 * an_epoch)
        killed += kill_after(seconds, tmp_path, "train", *options, *OFFLINE, *DATA, *resume)
        assert_usable(tmp_path, expected)
    code, output = finish(tmp_path, "train", *options, *OFFLINE, *DATA, *(["--resume"] if last.exists() else []))
    assert code == 0, output
    assert_same_training(whole, tmp_path)
    assert not unfinished(tmp_path)
