"""Two processes train like one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def train(folder, launcher, more):
    options = "-cfg configs/resnet18.yaml --data lite_data -cat bottle --exp_dir exp --epochs 3 --batch_size 9".split()
    options += ["-o", "input_size=64", "-o", "flow_step=1", "-o", "pretrained=offline"]
    options += more
    for name in ("configs", "lite_data"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, *launcher, ROOT / "train.py", *options]
    done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(folder / "results/exp/bottle/history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("more", [[], ["--amp"], ["-o", "feature_noise=0.1"]])
def test_two_processes_give_the_losses_of_one(tmp_path, more):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir", "log"]
    one, two = train(folders[0], [], more), train(folders[1], launcher, more)
    for key, tolerance in (("loss", 1e-4), ("image_auroc", 1e-2), ("pixel_auroc", 1e-3)):
        expected, actual = ([float(row[key]) for row in rows] for rows in (one, two))
        np.testing.assert_allclose(actual, expected, rtol=tolerance, err_msg=key)
    log = (folders[1] / "results/exp/bottle/train.log").read_text()
    assert "global batch 9 over 2 process(es), learning rate 0.001 (constant)" in log
    assert log.count("Epoch 3 - iter:3/3") == 1, "one process writes"
    assert "Epoch" not in (folders[1] / "log/workerlog.1").read_text(), "and one prints"
