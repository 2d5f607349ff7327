"""Ray clusters: nodes on this machine that are killed in the midst of a scoring and of a training.

`make test-cluster` installs Ray and runs these; `make test` skips them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from deploy.cluster.connection import LOOPBACK_ONLY, joined, places
from deploy.common.cli import UserError

os.environ.update(LOOPBACK_ONLY)  # before Ray is imported
ray = pytest.importorskip("ray", reason="Ray is not installed: make test-cluster")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: make test-cluster")

from ray.cluster_utils import Cluster

from deploy import Detector
from deploy.cluster.scoring import DEATHS, checksum, score_all

ROOT = Path(__file__).resolve().parent.parent
PICTURES = sorted((ROOT / "lite_data/bottle/test").rglob("*.png"))
MEMORY = 80 * 2**20  # bytes of each node's objects
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head without cores; `nodes` adds others."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=MEMORY)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes with a core each, removed after the test."""
    added = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    yield added
    for node in set(added) & cluster.worker_nodes:
        cluster.remove_node(node)


def start(cluster, *words, folder, **files):
    """A script of the repository as a process in this folder, which drives the cluster."""
    environ = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words), "--cluster", "auto"]
    command[1] = str(ROOT / command[1])
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, **files)


def scoring(cluster, model, pictures, out, *options, folder):
    words = ["deploy/score.py", "--save_inference_dir", model, "--input", pictures, "--output", out, "--batch_size", "4"]
    return start(cluster, *words, *options, folder=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def pictures_in(folder, count):
    """So many pictures, each hundredth of them broken."""
    folder.mkdir()
    for i in range(count):
        content = PICTURES[i % len(PICTURES)].read_bytes()
        (folder / f"{i:05d}.png").write_bytes(content[: 1000 if i % 100 == 7 else None])
    return folder


def rows_in(out):
    return [row for part in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(part).to_pylist()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def busy(node):
    """Whether a worker of the node has a model, or a training."""
    with contextlib.suppress(OSError, IndexError):
        raylet = node.all_processes["raylet"][0].process.pid
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if stat.read_text().rpartition(")")[2].split()[1] == str(raylet):
                    yield stat.parent.name


def test_a_killed_node_and_a_killed_driver_cost_no_row_and_double_none(cluster, nodes, exported, tmp_path):
    count = 600
    pictures, out = pictures_in(tmp_path / "pictures", count), tmp_path / "out"
    for signal_ in (signal.SIGKILL, signal.SIGTERM):
        before = len(list(out.glob("part-*")))
        process = scoring(cluster, exported, pictures, out, folder=tmp_path)
        wait_for(lambda: False)
        process.send_signal(signal_)
        process.communicate()
    process = scoring(cluster, exported, pictures, out, folder=tmp_path)
