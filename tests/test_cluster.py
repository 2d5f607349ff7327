"""Ray clusters: nodes of this machine that are killed in the midst of a scoring and of a training.

`make test-cluster` installs Ray and runs these; without it they are skipped.
"""

import argparse
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.cluster.connection import LOOPBACK_ONLY, answer, joined, places
from deploy.cluster.connection import cluster as cluster_option
from deploy.common.cli import UserError

os.environ.update(LOOPBACK_ONLY)  # before Ray is imported, which reads it then
ray = pytest.importorskip("ray", reason="Ray is not installed: make test-cluster")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: make test-cluster")

from ray.cluster_utils import Cluster  # noqa: E402

from deploy.cluster.scoring import DEATHS, VAIN_STARTS, checksum, score_all, starter  # noqa: E402
from deploy.detector import Detector  # noqa: E402
from utils.cluster_runs import ClusterRuns  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PICTURES = sorted((ROOT / "lite_data/bottle/test").rglob("*.png"))
MEMORY = 80 * 2**20  # bytes of each node's objects
# A part each moment, so that there is something to go on from.
SCORE = """
from deploy import score
from deploy.cluster import parts
parts.SECONDS = 0.1
score.run_main(score.main)
"""
LISTENING = """
import ray
from pathlib import Path
from deploy.cluster.connection import joined
def listening():
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {words[1] for words in lines if words[3] == "0A"}
before = listening()
with joined("local"):
    ray.get(ray.remote(lambda: 1).remote())
    print(*sorted(listening() - before))
"""
LOOPBACK = ("0100007F:", "0000000000000000FFFF00000100007F:")  # as /proc/net has it
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head without cores."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=MEMORY)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes of it with a core each, while the test runs."""
    added = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    yield added
    for node in set(added) & cluster.worker_nodes:
        cluster.remove_node(node)


@pytest.fixture
def driver(cluster, nodes, monkeypatch):
    """This process drives the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with joined("auto"):
        yield


def start(cluster, folder, *words):
    """Python in this folder, with the cluster to drive."""
    environ = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words), "--cluster", "auto"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def workers(title):
    """The parents (raylets) of the processes whose title begins like this: `ray::Scorer.score` is one that scores."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int((process / "stat").read_text().rpartition(")")[2].split()[1]))
    return found


def processes(folder, title):
    """The numbers of the processes that run in the folder, whose command has this in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (process / "cwd").resolve() == folder
            if here and title in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def rows_in(out):
    return [row for part in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(part).to_pylist()]


def test_killed_nodes_and_drivers_cost_no_row_and_double_none(cluster, nodes, exported, tmp_path):
    count = 500
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(count):
        content = PICTURES[i % len(PICTURES)].read_bytes()
        (pictures / f"{i:03d}.png").write_bytes(content[: 1000 if i % 100 == 7 else None])
    words = ["-c", SCORE, "--save_inference_dir", exported, "--input", pictures, "--output", out, "--batch_size", "4"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = len(list(out.glob("part-*")))
        process = start(cluster, tmp_path, *words)
        wait_for(lambda before=before: len(list(out.glob("part-*"))) > before)
        process.send_signal(number)
        code, _, err = finish(process)
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], err
    assert 0 < len(rows_in(out)) < count
    process = start(cluster, tmp_path, *words)
    hit = wait_for(lambda: workers("ray::Scorer.score"))[0]
    cluster.remove_node(next(node for node in nodes if raylet(node) == hit), allow_graceful=False)
    code, _, err = finish(process)
    assert code == 0, err
    assert "a process that scored has ended" in err
    rows = rows_in(out)
    assert sorted(row["path"] for row in rows) == sorted(map(str, pictures.iterdir()))
    assert sum(row["error"] is not None for row in rows) == count // 100
    assert len({row["model"] for row in rows}) == 1
    with Detector(exported, batch_size=4, cpu_threads=1) as detector:  # an undisturbed run
        for row in sorted(rows, key=lambda row: row["path"])[:20]:
            if not row["error"]:
                result = detector(row["path"]).to_dict()
                assert row["score"] == pytest.approx(result["score"], abs=1e-5)
                assert (row["label"], row["size"]) == (result["label"], result["size"])
    assert finish(start(cluster, tmp_path, *words))[1].endswith(
        f": 0 of {count} pictures to score, the others are in {out}\n"
    )


def deadly(path):
    """What starts scorers that end where they meet `path`, which may be "at once"."""

    @ray.remote
    class Deadly:
        def load(self):
            if path == "at once":
                os._exit(1)

        def score(self, paths, readable):
            if path in paths:
                os._exit(1)
            return [{"path": path, "sha256": "00"} for path in paths]

    return Deadly.remote


def test_a_picture_that_ends_processes_is_found_and_told(driver):
    pieces = (tuple(f"{first + i}" for i in range(4)) for first in range(0, 16, 4))
    rows = [row for rows in score_all(deadly("6"), 2, "m", pieces) for row in rows]
    assert sorted(int(row["path"]) for row in rows) == list(range(16))
    assert [row for row in rows if "error" in row] == [
        {"path": "6", "model": "m", "error": f"6: ended the process that read it, {DEATHS} times"}
    ]


def test_processes_that_end_at_once_end_the_run_in_a_line(driver, exported):
    with pytest.raises(UserError, match=f"{VAIN_STARTS} processes ended"):
        list(score_all(deadly("at once"), 2, "m", iter([("1",)])))
    with pytest.raises(UserError, match="is another model"):
        list(score_all(starter(exported, {"backend": "paddle"}, "m", 1, 0), 1, "m", iter([("1",)])))
    with pytest.raises(UserError, match="no machine of the cluster has that many"):
        places(2, 0)
    assert places(1, 0) == 2


def test_a_folder_of_pictures_that_vanishes_ends_the_run_in_a_line(driver, exported, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(PICTURES[0].parent, pictures)
    paths = sorted(map(str, pictures.iterdir()))
    model = checksum(exported)
    actor = starter(exported, {"backend": "paddle", "batch_size": 2}, model, 1, 0)()
    answer(actor.load.remote())
    pictures.joinpath("missing.png").touch()
    missing = str(pictures / "missing.png")
    rows = answer(actor.score.remote([f"{missing}.not", paths[0], f"{missing}.not", paths[1]], ""))
    assert ["error" in row for row in rows] == [True, False, True, False]
    shutil.rmtree(pictures)
    with pytest.raises(UserError, match="not there on"):
        answer(actor.score.remote(paths[2:4], paths[0]))


@pytest.mark.parametrize("read", [[], ["9"], ["0"]])
def test_pictures_are_missing_where_others_can_be_read(driver, read):
    @ray.remote
    class Reader:
        def load(self):
            pass

        def score(self, paths, readable):
            return [{"path": path, **({"sha256": "00"} if path in read else {"error": "missing"})} for path in paths]

    scored = score_all(Reader.remote, 2, "m", ((f"{2 * i}", f"{2 * i + 1}") for i in range(5)))
    if read:
        rows = [row for rows in scored for row in rows]
        assert sorted(row["path"] for row in rows) == sorted("0123456789")
        assert [row["path"] for row in rows if "error" not in row] == read
    else:
        with pytest.raises(UserError, match="cannot be read, nor can 9 others, and not one was"):
            list(scored)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_told_with_what_to_do(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cluster_option(address) == address
    told = f"--cluster {address}: no Ray cluster could be joined .*start one, set RAY_AUTH_MODE as it has it .*"
    with pytest.raises(UserError, match=told), joined(address):
        pass


@pytest.mark.parametrize("address", ["ray://", "ray://host", "ray://host:port", "10.0.0.1:6379"])
def test_what_is_no_cluster_is_told(address):
    with pytest.raises(argparse.ArgumentTypeError, match="must be auto, local or ray://HOST:10001"):
        cluster_option(address)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_leaves_no_process(number, exported, tmp_path):
    words = ["deploy/score.py", "--save_inference_dir", exported, "--input", PICTURES[0].parent]
    command = [sys.executable, *map(str, words), "--output", str(tmp_path / "out"), "--cluster", "local"]
    environ = {**os.environ, "STARTED_BY": str(tmp_path)}  # its processes have it too
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: marked(tmp_path) - {process.pid})
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines()[:1] == ["error: interrupted"] * (number == signal.SIGINT), err
    wait_for(lambda: not marked(tmp_path), seconds=10)


def marked(folder):
    """The processes that have this folder in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"STARTED_BY={folder}".encode() in (process / "environ").read_bytes():
                found.add(int(process.name))
    return found


def test_more_than_any_machine_has_is_refused_at_once(driver):
    with pytest.raises(UserError, match="--cpus 9 --gpus 0: no machine of the cluster has that many"):
        ClusterRuns(9, 0, jobs=1)


def test_what_is_started_here_listens_on_the_loopback_interface_only(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name not in LOOPBACK_ONLY}
    code = [sys.executable, "-c", LISTENING]
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(code, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3, "nothing listens?"
    assert [address for address in done.stdout.split() if not address.startswith(LOOPBACK)] == []


def losses(folder, category):
    with open(folder / "results/exp" / category / "history.csv", newline="") as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


def test_a_training_goes_on_when_its_node_is_killed_and_ends_with_its_driver(cluster, nodes, tmp_path):
    """Both categories have the same pictures, so that one is the undisturbed run of the other."""
    for name in ("one", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train", "test"):
            (tmp_path / "data" / name / part).symlink_to(ROOT / "lite_data/bottle" / part)
    words = [ROOT / "train_all.py", "-cfg", ROOT / "configs/resnet18.yaml", "--data", "data", "--epochs", "60"]
    words += [word for option in ("input_size=32", "flow_step=1", "pretrained=offline") for word in ("-o", option)]
    last = [tmp_path / "results/exp" / name / "last.pdparams" for name in ("one", "other")]

    process = start(cluster, tmp_path, *words)
    wait_for(lambda: all(path.exists() for path in last))
    process.send_signal(signal.SIGINT)
    code, said, err = finish(process)
    assert (code, err.splitlines()[-1]) == (130, "error: interrupted"), err
    assert "stopped" in said
    assert not processes(tmp_path, b"train.py")

    before = last[0].stat().st_mtime_ns
    process = start(cluster, tmp_path, *words)
    wait_for(lambda: last[0].stat().st_mtime_ns > before)
    for number in processes(tmp_path, b"train.py"):
        if b"one" in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0"):
            worker = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    hit = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    cluster.remove_node(next(node for node in nodes if raylet(node) == hit), allow_graceful=False)
    code, said, err = finish(process)
    assert code == 0, err + said
    assert "one  its machine was lost, it goes on on machine" in said
    assert "one    done" in said and "other  done" in said
    assert len(losses(tmp_path, "one")) == 60
    assert losses(tmp_path, "one") == losses(tmp_path, "other")
    wait_for(lambda: not processes(tmp_path, b"ray::"), 20)
