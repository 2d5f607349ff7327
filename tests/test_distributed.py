"""Two processes train like one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.common.cli import UserError
from utils import distributed

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir", "log"]


def train(folder, launcher, more):
    options = "-cfg configs/resnet18.yaml --data lite_data -cat bottle --exp_dir exp --epochs 3 --batch_size 9".split()
    options += ["-o", "input_size=64", "-o", "flow_step=1", "-o", "pretrained=offline"]
    options += more
    for name in ("configs", "lite_data"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, *launcher, ROOT / "train.py", *options]
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as many as it takes
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(folder / "results/exp/bottle/history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--amp", "-o", "feature_noise=0.1"]])
def test_two_processes_give_the_losses_of_one(tmp_path, more):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = train(folders[0], [], more), train(folders[1], LAUNCHER, more)
    for key, tolerance in (("loss", 1e-4), ("image_auroc", 1e-2), ("pixel_auroc", 1e-3)):
        expected, actual = ([float(row[key]) for row in rows] for rows in (one, two))
        np.testing.assert_allclose(actual, expected, rtol=tolerance, err_msg=key)
    log = (folders[1] / "results/exp/bottle/train.log").read_text()
    assert "global batch 9 over 2 process(es), learning rate 0.001 (constant)" in log
    assert log.count("Epoch 3 - iter:3/3") == 1, "one process writes"
    assert "Epoch" not in (folders[1] / "log/workerlog.1").read_text(), "and one prints"


WAITING = """
import time
import paddle.distributed as dist
from utils import distributed

entered = []
broadcast = dist.broadcast_object_list


def noted(*args):
    entered.append(time.time())
    broadcast(*args)


dist.broadcast_object_list = noted
distributed.join()
(left,) = distributed.from_first(lambda: (time.sleep(2), time.time())[1:])
assert entered[0] >= left, "it waited in an exchange, which ends after 30 seconds"

for rank in (0, 1):
    if dist.get_rank() == rank:
        time.sleep(2)
        left = time.time()
    distributed.meet()
assert dist.get_rank() == 1 or time.time() >= left + 2, "it did not wait for the second process"
"""


@pytest.mark.slow
def test_processes_wait_for_the_first_outside_of_exchanges(tmp_path):
    """So that it may take longer than gloo's 30 seconds."""
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, *LAUNCHER, "waiting.py"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (tmp_path / "log/workerlog.1").read_text() + done.stderr


@pytest.mark.parametrize(("ended", "longest"), [(0, 0), (1, 3600)])
def test_a_process_that_has_ended_is_not_waited_for(monkeypatch, ended, longest):
    class Store:
        def add(self, key, amount):
            return {"arrivals": 3, "ended": ended}[key]

    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed.core, "create_or_get_global_tcp_store", Store)
    monkeypatch.setattr(distributed, "LONGEST_WAIT", longest)
    with pytest.raises(UserError, match=r"1 of 2 processes do not come .*workerlog"):
        distributed.meet()


def test_a_process_may_end_right_after_it_came(monkeypatch):
    """It comes and ends right after this one has looked how many have come."""
    counts = {"arrivals": 2, "ended": 0}

    class Store:
        def add(self, key, amount):
            counts[key] += amount
            value = counts[key]
            if key == "arrivals" and not amount:
                counts.update(arrivals=4, ended=1)
            return value

    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed.core, "create_or_get_global_tcp_store", Store)
    distributed.meet()


def test_the_end_of_the_first_process_is_one_line(monkeypatch):
    class Store:
        def add(self, key, amount):
            raise ValueError("(InvalidArgument) TCP send error. Details: Broken pipe.")

    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed.core, "create_or_get_global_tcp_store", Store)
    with pytest.raises(UserError, match=r"the first process has ended.*workerlog"):
        distributed.meet()
