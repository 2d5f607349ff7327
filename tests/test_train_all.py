"""train.sh: every category over all devices. Where nothing is learnt train.py and eval.py are stand-ins, for speed."""

import contextlib
import importlib
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import train_all
from deploy.common import runtime
from utils.config import load_config
from utils.grid import Cell, Job
from utils.history import EpochRow, finished
from utils.runs import LocalRuns

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

TRAIN = """
import argparse, json, os, pickle, sys, time
from pathlib import Path
from utils.config import load_config
parser = argparse.ArgumentParser()
for name in ("-cfg", "--data", "--exp_dir", "-cat", "--device"):
    parser.add_argument(name)
parser.add_argument("--resume", action="store_true")
parser.add_argument("-o", action="append", default=[])
args = parser.parse_args()
note = {"category": args.cat, "resume": args.resume, "device": args.device, "begin": time.monotonic()}
note.update({name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PADDLE_LOCAL_SIZE", "OMP_NUM_THREADS")})
folder = Path("results", args.exp_dir, args.cat)
last = folder / "last.pdparams"
Path(f"begun_{args.cat}").touch()
try:
    if "broken" in args.cat:
        print("much happens\\n" * 3)
        sys.exit(f"error: {args.cat}: the last line")
    if "silent" in args.cat:
        sys.exit(3)
    if "killed" in args.cat:
        print("before the end", flush=True)
        os.kill(os.getpid(), 9)
    config = load_config(args.cfg, args.o)
    history = pickle.loads(last.read_bytes())["history"] if args.resume and last.exists() else []
    for epoch in range(len(history) + 1, config.epochs + 1):
        time.sleep(60 if "slow" in args.cat and epoch > 1 and not args.resume else 0.3)
        history.append({"epoch": epoch, "loss": 1 / epoch, "lr": 0.001, "image_auroc": 0.5 + epoch / 100,
                        "pixel_auroc": 0.25, "selection": 0.0 if epoch > 1 else 1.0, "seconds": 1.0})
        content = {"epoch": epoch, "model_state_dict": {}, "config": config.as_dict(), "history": history}
        last.write_bytes(pickle.dumps(content))
        print(f"{args.cat}  Epoch {epoch} - loss = {1 / epoch:.3f}", flush=True)
finally:
    note["end"] = time.monotonic()
    with open("notes.jsonl", "a") as notes:
        print(json.dumps(note), file=notes)
"""
EVAL = "import sys\nprint('the table of', *sys.argv[1:])\n"


class Place:
    """A folder with train.sh, stand-ins for what it calls, and categories."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("train.sh", "train_all.py"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "train.py").write_text(TRAIN)
        (folder / "eval.py").write_text(EVAL)
        self.configure(epochs=2)

    def configure(self, **changes: object) -> None:
        values = yaml.safe_load((ROOT / "configs/resnet18.yaml").read_text())
        (self.folder / "config.yaml").write_text(yaml.safe_dump({**values, **changes}))

    def start(self, *categories: str, **environ: str) -> subprocess.Popen:
        for name in categories:
            (self.folder / "data" / name / "test").mkdir(parents=True, exist_ok=True)
        free = {name: value for name, value in os.environ.items() if name not in ("GPUS", "JOBS", "OMP_NUM_THREADS")}
        free.update({"python": sys.executable, "config": "config.yaml", "PYTHONPATH": str(ROOT), **environ})
        command = ["sh", "train.sh"]
        return subprocess.Popen(
            command, cwd=self.folder, env=free, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *categories: str, **environ: str) -> subprocess.CompletedProcess:
        process = self.start(*categories, **environ)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def last(self, name: str) -> Path:
        return self.folder / "results/exp" / name / "last.pdparams"

    def notes(self) -> list[dict]:
        """What the trainings were called with, in the order of their ends; each is told once."""
        path = self.folder / "notes.jsonl"
        lines = path.read_text().splitlines()
        path.unlink()
        return [json.loads(line) for line in lines]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def at_once(notes: list[dict]) -> int:
    """The most trainings that ran at the same time."""
    return max(sum(b["begin"] <= a["begin"] < b["end"] for b in notes) for a in notes)


def test_one_category_after_the_other_in_the_published_order(place):
    done = place.run("own", "wood", "bottle")
    assert done.returncode == 0, done.stderr
    notes = place.notes()
    assert [note["category"] for note in notes] == ["bottle", "wood", "own"]
    assert at_once(notes) == 1
    assert re.search("skipped, no folder under data: .*zipper", done.stderr)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["bottle  queued", "wood    queued", "own     queued"]
    bottle = ["bottle  started", "bottle  Epoch 1 - loss = 1.000", "bottle  Epoch 2 - loss = 0.500"]
    assert lines[3:7] == [*bottle, "bottle  done  image AUROC 0.510, pixel AUROC 0.250 (epoch 1 of 2)"]
    assert lines[-1].startswith("the table of -cfg config.yaml --data ./data --exp_dir exp -cat all")
    assert (place.folder / "results/exp/bottle/output.log").read_text().splitlines() == bottle[1:]


def test_a_trial_is_named_in_the_environment(place):
    done = place.run("bottle", epochs="1", options="-o lr=0.0005 -o batch_size=8")
    assert done.returncode == 0, done.stderr
    assert "(epoch 1 of 1)" in done.stdout
    options = "-o lr=0.0005 -o batch_size=8 -o epochs=1"
    assert done.stdout.splitlines()[-1] == (
        f"the table of -cfg config.yaml --data ./data --exp_dir exp {options} -cat all"
    )
    last = pickle.loads(place.last("bottle").read_bytes())
    assert (last["config"]["lr"], last["config"]["batch_size"], last["config"]["epochs"]) == (0.0005, 8, 1)


def test_where_there_is_no_python_it_is_python3(place):
    commands = place.folder / "bin"
    commands.mkdir()
    for name in ("sh", "dirname", "env"):
        (commands / name).symlink_to(shutil.which(name))
    (commands / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (commands / "python3").chmod(0o755)
    done = place.run("bottle", python="", PATH=str(commands))
    assert done.returncode == 0, done.stderr
    assert "done  image AUROC" in done.stdout


def test_jobs_share_the_machine(place):
    done = place.run("a", "b", "c", "d", "e", JOBS="2")
    assert done.returncode == 0, done.stderr
    notes = place.notes()
    assert sorted(note["category"] for note in notes) == list("abcde")
    assert at_once(notes) == 2
    # runtime.import_paddle() and the feature cache divide by the former, unless the latter is set
    assert {(note["PADDLE_LOCAL_SIZE"], note["OMP_NUM_THREADS"]) for note in notes} == {("2", None)}


def test_each_card_has_one_category_at_a_time(place):
    done = place.run("a", "b", "c", "d", GPUS="0,3")
    assert done.returncode == 0, done.stderr
    notes = place.notes()
    for card in "03":
        on_card = [note for note in notes if note["CUDA_VISIBLE_DEVICES"] == card]
        assert len(on_card) >= 1
        assert at_once(on_card) == 1
    assert at_once(notes) == 2
    assert {note["device"] for note in notes} == {"gpu"}
    assert "started on GPU 3" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("--device gpu")


def test_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(runtime, "gpu_count", lambda: 0)
    assert train_all.choose_devices(None, None) == [None]
    assert train_all.choose_devices(None, 2) == [None, None]
    monkeypatch.setattr(runtime, "gpu_count", lambda: 2)
    assert train_all.choose_devices(None, None) == ["0", "1"]
    assert train_all.choose_devices(["5"], None) == ["5"]
    assert train_all.choose_devices(None, 3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7,-1,8")  # CUDA ends the list at the -1
    assert train_all.choose_devices(None, None) == ["6", "7"]


def test_a_category_that_fails_spoils_no_other(place):
    done = place.run("broken", "killed", "last", "silent", JOBS="2")
    assert done.returncode == 1
    assert "train.sh: broken failed: error: broken: the last line; see results/exp/broken" in done.stderr
    assert "train.sh: killed failed: ended by SIGKILL after: before the end" in done.stderr
    assert "train.sh: silent failed: exit code 3, nothing printed" in done.stderr
    assert "last    done" in done.stdout
    assert "the table of" in done.stdout


def test_starting_again_goes_on_and_names_what_another_config_trained(place):
    place.configure(epochs=3)
    assert place.run("cut", "foreign", "whole").returncode == 0
    content = {name: pickle.loads(place.last(name).read_bytes()) for name in ("cut", "foreign")}
    content["cut"].update(epoch=1, history=content["cut"]["history"][:1])
    content["foreign"]["config"].update(lr=0.5, clamp=1.0)
    for name in content:
        place.last(name).write_bytes(pickle.dumps(content[name]))
    before = place.last("foreign").read_bytes()
    place.notes()
    done = place.run("new")
    assert [(note["category"], note["resume"]) for note in place.notes()] == [("cut", True), ("new", False)]
    for name in ("cut", "whole", "new"):
        assert re.search(rf"{name} +done .*\(epoch 1 of 3\)", done.stdout)
    assert done.returncode == 1
    line = "foreign/last.pdparams: was trained with clamp 1.0, lr 0.5, the config says clamp 2.0, lr 0.001"
    assert line in done.stderr
    assert place.last("foreign").read_bytes() == before


def test_a_checkpoint_that_train_py_never_wrote_spoils_no_other_category(place):
    assert place.run("first").returncode == 0
    content = pickle.loads(place.last("first").read_bytes())
    content["config"]["lr"] = np.zeros(2)  # which cannot be compared with a number
    place.last("first").write_bytes(pickle.dumps(content))
    done = place.run("other")
    assert done.returncode == 1
    assert "first/last.pdparams: not a checkpoint; its config: lr must be a number" in done.stderr
    assert re.search("other +done", done.stdout)


def test_an_error_that_nobody_expected_spoils_no_other_category(tmp_path, monkeypatch):
    def so_far(folder, config):
        if folder.name == "first":
            raise ValueError("of its own")
        return [EpochRow(1, 0.5, 0.001, 1.0, 0.9, 0.95, 2.0)]

    shown = {}
    board = SimpleNamespace(show=lambda name, text: shown.update({name: text}))
    monkeypatch.setattr(train_all, "trained_so_far", so_far)
    monkeypatch.setattr(train_all, "finished", lambda history, config: True)
    cell = Cell(None, "config", "", [])
    trainings = train_all.Trainings(tmp_path, LocalRuns([None], {}), board)
    assert trainings.run([Job("first", cell), Job("other", cell)]) == {"first": "unexpected ValueError('of its own')"}
    assert shown["first"] == "failed: unexpected ValueError('of its own')"
    assert shown["other"] == "done  image AUROC 1.000, pixel AUROC 0.900 (epoch 1 of 1)"


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "")]
)
def test_interrupting_ends_the_trainings_and_keeps_what_they_have(place, number, code, said):
    process = place.start("slow1", "slow2", "third", JOBS="2")
    wait_for(lambda: len(list(place.folder.glob("results/exp/*/last.pdparams"))) == 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err.partition("\n")[2].rstrip("\n") == said  # after the line that names the categories which are not there
    assert sorted(note["category"] for note in place.notes()) == ["slow1", "slow2"], (
        "they did not end, or another began"
    )
    assert "slow1  stopped" in out
    assert "the table of" not in out


def test_kill_9_ends_the_trainings_too_and_the_next_start_goes_on(place):
    process = place.start("slow", "third")
    wait_for(lambda: place.last("slow").exists())
    process.kill()
    process.communicate(timeout=20)  # until nobody holds its output any more
    wait_for(lambda: not trainings(place.folder))
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert [(note["category"], note["resume"]) for note in place.notes()] == [("slow", True), ("third", False)]


def trainings(folder: Path) -> list[str]:
    """The numbers of the processes that run train.py in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (process / "cwd").resolve() == folder
            if here and b"train.py" in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_there_are_no_more_jobs_than_categories(place):
    assert place.run("part", "other", JOBS="8").returncode == 0
    assert {note["PADDLE_LOCAL_SIZE"] for note in place.notes()} == {"2"}


def test_what_a_training_prints_is_logged_where_its_folder_is(place):
    """It puts the folder of an earlier training aside in the midst of its lines."""
    aside = "print('before', flush=True)\ntime.sleep(0.5)\nfolder.rename(f'{folder}.old')\nfolder.mkdir()\ntry:"
    (place.folder / "train.py").write_text(TRAIN.replace("try:", aside, 1))
    assert place.run("bottle").returncode == 0
    lines = [(place.folder / f"results/exp/{name}/output.log").read_text() for name in ("bottle.old", "bottle")]
    assert (lines[0], lines[1].count("Epoch")) == ("before\n", 2)


def test_a_terminal_shows_a_line_per_category(place):
    for name in ("a", "b", "broken"):
        (place.folder / "data" / name / "test").mkdir(parents=True)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environ = {**os.environ, "python": sys.executable, "config": "config.yaml", "PYTHONPATH": str(ROOT), "JOBS": "2"}
    with subprocess.Popen(["sh", "train.sh"], cwd=place.folder, env=environ, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                text += os.read(ours, 4096)
            except OSError:  # its other end is closed
                break
    os.close(ours)
    assert process.returncode == 1
    text = text.decode()
    assert "\x1b[A" in text, "lines are rewritten"
    for state in ("a       queued", "a       running  Epoch 1", "b       done  image AUROC", "broken  failed: error"):
        assert state in text
    assert "\na  Epoch" not in text, "no other lines"


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"JOBS": "0"}, "--jobs"),
        ({"GPUS": "0,,1"}, "--gpus"),
        ({"config": "no.yaml"}, "no.yaml"),
        ({"data": "nowhere"}, "nowhere"),
        ({"dir_name": "/"}, "--exp_dir"),
    ],
)
def test_bad_input_is_one_line(place, environ, word):
    (place.folder / "data/part/test").mkdir(parents=True)
    command = ["sh", "train.sh"]
    variables = {**os.environ, "python": sys.executable, "config": "config.yaml", **environ}
    done = subprocess.run(command, cwd=place.folder, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (place.folder / "results").exists()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_documented_slurm_script(place, language):
    """Its body, as a task of an array runs it: the second category, then the same again."""
    page = (ROOT / f"docs/{language}/distributed.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
    for category in ("bottle", "my part", "zipper"):
        (place.folder / "data" / category / "test").mkdir(parents=True)
    (place.folder / "data/license.txt").touch()  # MVTec AD has it beside the categories
    (place.folder / "configs").mkdir()
    (place.folder / "configs/resnet18.yaml").symlink_to(place.folder / "config.yaml")
    python = place.folder / "python"  # no link, which would not find what is installed beside the true one
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (place.folder / "results/exp/my part").mkdir(parents=True)  # train.py itself makes it
    environ = {**os.environ, "PATH": f"{place.folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        command = ["bash", "-c", text]
        subprocess.run(command, cwd=place.folder, env={**environ, "SLURM_ARRAY_TASK_ID": "2"}, check=True, timeout=60)
    assert [(note["category"], note["resume"]) for note in place.notes()] == [("my part", True)] * 2


def test_two_real_categories_at_a_time(tmp_path):
    """A category of MVTec's name and one of the user's, without masks, in the published scripts."""
    for name in ("train.sh", "train_all.py", "train.py", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("bottle", "my part"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train", "test"):
            (tmp_path / "data" / name / part).symlink_to(ROOT / "lite_data/bottle" / part)
    values = yaml.safe_load((ROOT / "configs/resnet18.yaml").read_text())
    values.update(input_size=32, flow_step=1, pretrained="offline", epochs=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    environ = {**os.environ, "python": sys.executable, "config": "tiny.yaml", "JOBS": "2"}

    done = subprocess.run(["sh", "train.sh"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"my part          pixel auroc:n/a   image auroc:\d\.\d{3}\n", done.stdout)
    assert re.search(r"bottle           pixel auroc:n/a   image auroc:\d\.\d{3}\n", done.stdout)
    assert re.search(r"bottle +done  image AUROC \d\.\d{3}, pixel AUROC n/a \(epoch 1 of 1\)", done.stdout)
    assert "learning rate 0.001 (constant)" in done.stdout
    config = load_config(tmp_path / "tiny.yaml")
    assert finished(train_all.trained_so_far(tmp_path / "results/exp/bottle", config), config)


def test_it_takes_nothing_that_python_3_10_lacks(monkeypatch):
    monkeypatch.delattr("typing.Self", raising=False)
    importlib.reload(train_all)
