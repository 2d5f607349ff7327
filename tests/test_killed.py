"""Nothing is lost: kill -9 at random moments, two trainings in one folder, a full disk."""

import contextlib
import csv
import itertools
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy import export_model
from deploy.backends import model_files
from deploy.common.cli import UserError
from deploy.description import read_description
from tests.forked import outputs, start
from tests.test_files import recorded
from utils.checkpoint import load_checkpoint
from utils.config import load_config
from utils.history import EpochRow, best_row
from utils.log import make_logger
from utils.thresholds import load_thresholds
from utils.weights import OFFLINE_WARNING

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
DATA = ["--data", str(ROOT / "lite_data"), "-cat", "bottle", "--exp_dir", "exp"]
# What chooses the best epoch: the test set; the last one, with a moving average and held-out pictures.
BY_TEST_SET = ["-cfg", str(ROOT / "configs/resnet18.yaml"), "-o", "input_size=32", "-o", "flow_step=1"]
AUTO = ["-cfg", str(ROOT / "configs/auto.yaml"), "-o", "input_size=32", "-o", "flow_step=1"]
TRAIN = ["-o", "pretrained=offline", "--batch_size", "12", *DATA]
CHECKPOINTS = ("best.pdparams", "last.pdparams")
FOLDER = Path("results/exp/bottle")


def finish(folder, module, *options, **hazards):
    """Run a command to its end; return its exit code and what it has said."""
    process = start(module, [str(option) for option in options], folder, **hazards)
    process.join(200)
    return process.exitcode, "".join(path.read_text() for path in outputs(folder, process.pid))


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
    targets = (*CHECKPOINTS, "history.csv", "config.yaml", "curves.png", "sensitivity.json", "sensitivity.png")
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
            code, output = finish(folder, "train", *options, *TRAIN)
            seconds = time.perf_counter() - begun
            assert code == 0, output
            spent = [row["seconds"] for row in table(folder)]
            known[key] = folder, seconds - sum(spent), statistics.median(spent)
        return known[key]

    return train


def kill_before_every_file(check, folder, module, *options):
    """Run a command until it comes to its end, killed before it names its first file, its second and so on.

    `check` is called after every kill, with the number of files that had their names. Returns how often it was killed.
    """
    for named in itertools.count():
        code, output = finish(folder, module, *options, kill_at_rename=named + 1)
        if code == 0:
            return named
        assert code == -signal.SIGKILL, output
        check(named)


def test_a_training_that_is_killed_again_and_again_goes_on_to_the_same_end(tmp_path, trained):
    """At random moments; it holds out pictures, keeps a moving average, and ends when it has waited for a new best."""
    options = [*BY_TEST_SET, "--epochs", "16", "-o", "patience=3", "-o", "ema_decay=0.7", "-o", "holdout=0.1"]
    options += ["-o", "lr=0.02", "-o", "seed=3"]
    whole, to_start, an_epoch = trained(options)
    expected = table(whole)
    assert 1 < load_checkpoint(whole / FOLDER / "best.pdparams")["epoch"] < len(expected) < 16
    chance = random.Random("training")
    killed = 0
    last = tmp_path / FOLDER / "last.pdparams"
    while killed < 20:
        finished = last.exists() and load_checkpoint(last)["epoch"] == len(expected)
        resume = [] if finished else ["--resume"]  # a finished training would leave nothing to kill
        seconds = chance.uniform(0, to_start + 2 * an_epoch)
        killed += kill_after(seconds, tmp_path, "train", *options, *TRAIN, *resume)
        assert_usable(tmp_path, expected)
    code, output = finish(tmp_path, "train", *options, *TRAIN, "--resume")
    assert code == 0, output
    assert_same_training(whole, tmp_path)
    assert not unfinished(tmp_path)


def test_a_training_that_is_killed_before_each_of_its_files_goes_on_to_the_same_end(tmp_path, trained):
    options = [*AUTO, "--epochs", "2"]
    whole, _, _ = trained(options)
    command = ["train", *options, *TRAIN, "--resume"]
    kills = kill_before_every_file(lambda _: assert_usable(tmp_path, table(whole)), tmp_path, *command)
    assert kills >= 5  # a checkpoint, the best one, history and config; then the next checkpoint
    assert_same_training(whole, tmp_path)
    assert not unfinished(tmp_path)


@pytest.mark.parametrize("renames", [1, 2, 3, 4, 5])
def test_a_training_that_is_killed_over_an_older_one_goes_on_and_keeps_that(tmp_path, trained, renames):
    """The older one, whose folder is renamed first, has other losses; nothing of it may be mixed into the new one."""
    options = [*BY_TEST_SET, "--epochs", "2"]
    whole, _, _ = trained(options)
    older, _, _ = trained([*options, "-o", "seed=1"])
    shutil.copytree(older / "results", tmp_path / "results")
    code, output = finish(tmp_path, "train", *options, *TRAIN, kill_at_rename=renames)
    assert code == -signal.SIGKILL, output
    assert_usable(tmp_path, table(older) if renames == 1 else table(whole))
    # Before that there is nothing to go on from but the older one.
    resume = [] if renames == 1 else ["--resume"]
    code, output = finish(tmp_path, "train", *options, *TRAIN, *resume)
    assert code == 0, output
    assert_same_training(whole, tmp_path)
    kept = (tmp_path / FOLDER).with_name("bottle.old")
    for name in (*CHECKPOINTS, "history.csv", "train.log", "curves.png"):
        assert (kept / name).read_bytes() == (older / FOLDER / name).read_bytes()


def undated(path):
    """The bytes of a file, without the minute that a report was written in."""
    return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", path.read_bytes())


def test_an_evaluation_that_is_killed_before_each_of_its_files_comes_to_the_same_end(tmp_path, trained):
    older, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    command = [*BY_TEST_SET, *DATA, "--threshold_rule", "f1", "--save_maps"]
    for name in ("whole", "killed"):
        shutil.copytree(older / "results", tmp_path / name / "results")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert finish(whole, "eval", *command)[0] == 0
    files = {path.relative_to(whole): undated(path) for path in (whole / "results").rglob("[!.]*.*")}
    made = {path for path in files if not (older / path).exists()}
    assert len(made) == 10

    def check(named):
        load_thresholds(folder / FOLDER / "best.pdparams", load_config("configs/resnet18.yaml"))
        there = [path for path in made if (folder / path).exists()]
        assert len(there) == named
        assert all(undated(folder / path) == files[path] for path in there)

    assert kill_before_every_file(check, folder, "eval", *command) == len(made)
    assert {path: undated(folder / path) for path in files} == files
    assert not unfinished(folder)


COMMANDS = {
    "train": [*BY_TEST_SET, "--epochs", "2", *TRAIN],
    "eval": [*BY_TEST_SET, *DATA],
    "predict": [*BY_TEST_SET, "-cat", "bottle", "--image_path", str(ROOT / "images")],
    "deploy.export_model": [*BY_TEST_SET, "-cat", "bottle"],
    "deploy.infer": ["--image_path", str(ROOT / "images"), "--output_dir", "drawings", "--save_json", "results.jsonl"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_ends_a_command_without_a_word_and_it_puts_away_what_it_had_begun(tmp_path, trained, command):
    """It is what `timeout` and `docker stop` send; here it comes while a file is being written."""
    whole, _, _ = trained([*BY_TEST_SET, "--epochs", "2"])
    if command != "train":
        shutil.copytree(whole / "results", tmp_path / "results")
    if command == "deploy.infer":
        assert finish(tmp_path, "deploy.export_model", *COMMANDS["deploy.export_model"])[0] == 0
    process = start(command, COMMANDS[command], tmp_path, kill_at_rename=1, signal_at_rename=signal.SIGTERM)
    process.join(100)
    said, errors = (path.read_text() for path in outputs(tmp_path, process.pid))
    assert (process.exitcode, errors.removeprefix(f"{OFFLINE_WARNING}\n")) == (143, "")
    assert not list(tmp_path.rglob(".*"))
    if command == "deploy.infer":  # what it has found is kept
        assert said.startswith(str(ROOT / "images/bottle_bad.png"))
        assert [json.loads(line)["path"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
            str(ROOT / "images/bottle_bad.png")
        ]


def test_an_export_that_is_killed_before_each_of_its_files_comes_to_the_same_end(tmp_path, trained):
    older, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    command = [*BY_TEST_SET, "-cat", "bottle", "--exp_dir", "exp"]
    for name in ("whole", "killed"):
        shutil.copytree(older / "results", tmp_path / name / "results")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert finish(whole, "deploy.export_model", *command)[0] == 0
    expected = read_description(whole / "results/inference")
    best = (folder / FOLDER / "best.pdparams").read_bytes()

    def check(named):
        with contextlib.suppress(UserError):  # says that files are missing or do not belong together
            assert read_description(folder / "results/inference") == expected

    assert kill_before_every_file(check, folder, "deploy.export_model", *command) == 3
    assert read_description(folder / "results/inference") == expected
    assert (folder / FOLDER / "best.pdparams").read_bytes() == best
    assert not unfinished(folder)


# ---- two in one folder


def test_a_second_training_into_the_same_folder_says_so_and_stops(tmp_path):
    options = [*BY_TEST_SET, "--epochs", "500", *TRAIN]
    first = start("train", options, tmp_path)
    try:
        while not (tmp_path / FOLDER / "history.csv").exists():
            assert first.is_alive()
            time.sleep(0.1)
        code, output = finish(tmp_path, "train", *options, "--resume")
        assert code == 2
        assert re.fullmatch(rf"error: {FOLDER}: process {first.pid} on \S+ is at work there; .*\n", output)
        code, output = finish(tmp_path, "eval", *BY_TEST_SET, *DATA)
        assert code == 0, output
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    epochs = len(table(tmp_path)) + 1
    code, output = finish(tmp_path, "train", *BY_TEST_SET, "--epochs", epochs, *TRAIN, "--resume")
    assert code == 0, output
    assert len(table(tmp_path)) == epochs


def test_the_lock_ends_with_its_process(tmp_path):
    hold = (
        f"from pathlib import Path; from deploy.common.files import hold_folder; hold_folder(Path({str(tmp_path)!r}))"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", hold], cwd=ROOT, check=True)
        assert not list(tmp_path.iterdir())


# ---- a full disk


@pytest.fixture(params=["size of a file", "small disk"])
def full_disk(request, tmp_path, trained):
    """A folder with a training of one epoch on a disk with room for it, but not for a third checkpoint; its limit."""
    whole, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    size = (whole / FOLDER / "last.pdparams").stat().st_size
    if request.param == "size of a file":
        shutil.copytree(whole / "results", tmp_path / "results")
        yield tmp_path, size // 2
        return
    (tmp_path / "results").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * size + size // 2}", "tmpfs", tmp_path / "results"]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        shutil.copytree(whole / "results", tmp_path / "results", dirs_exist_ok=True)
        yield tmp_path, 0
    finally:
        subprocess.run(["umount", tmp_path / "results"], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_files_before(full_disk):
    folder, largest_file = full_disk
    before = {
        path.name: path.read_bytes()
        for path in (folder / FOLDER).iterdir()
        if path.suffix != ".log" and path.name != ".lock"
    }
    code, output = finish(folder, "train", *BY_TEST_SET, "--epochs", "3", *TRAIN, "--resume", largest_file=largest_file)
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert output.endswith(errors[0] + "\n") and "Traceback" not in output
    assert re.fullmatch(r"error: \S+: cannot be written \((No space left on device|File too large)\)", errors[0])
    assert {name: (folder / FOLDER / name).read_bytes() for name in before} == before
    assert not unfinished(folder)
    assert load_checkpoint(folder / FOLDER / "last.pdparams")["epoch"] == 1


def test_an_evaluation_onto_a_full_disk_is_one_line_and_keeps_the_files_before(tmp_path, trained):
    whole, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    shutil.copytree(whole / "results", tmp_path / "results")
    command = [*BY_TEST_SET, *DATA]
    assert finish(tmp_path, "eval", *command, draws=True)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    for largest_file in (400, 1000, 10_000):  # what it prints before the first file is smaller
        code, output = finish(tmp_path, "eval", *command, largest_file=largest_file, draws=True)
        assert code == 2, output
        assert re.search(r"^error: \S+: cannot be written \(File too large\)$", output, re.MULTILINE)
        assert "Traceback" not in output
        assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == before


def test_an_export_onto_a_full_disk_is_one_line(full_disk):
    folder, largest_file = full_disk
    command = [*BY_TEST_SET, "-cat", "bottle", "--exp_dir", "exp"]
    code, output = finish(folder, "deploy.export_model", *command, largest_file=largest_file)
    assert code == 2, output
    assert re.fullmatch(r"error: results/inference: .*make room on its disk and export again\n", output)
    assert [path.name for path in (folder / "results/inference").iterdir()] == []


def test_an_export_that_is_cut_short_anywhere_keeps_the_one_before(tmp_path, trained):
    """Paddle reads parameters of which the end of the last array is missing, and says nothing where it writes them."""
    whole, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    shutil.copytree(whole / "results", tmp_path / "results")
    command = [*BY_TEST_SET, "-cat", "bottle", "--exp_dir", "exp"]
    assert finish(tmp_path, "deploy.export_model", *command)[0] == 0
    folder = tmp_path / "results/inference"
    before = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    program, parameters = (len(before[name]) for name in model_files(folder, "paddle"))
    for largest_file in (500, program - 1, parameters // 2, parameters - 1):
        code, output = finish(tmp_path, "deploy.export_model", *command, largest_file=largest_file)
        assert code == 2, output
        assert re.fullmatch(r"error: results/inference: .*\n", output)
        assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == before
        assert not (folder / ".export").exists()


def test_what_an_export_has_renamed_stays_after_a_power_cut(tmp_path, trained, monkeypatch):
    whole, _, _ = trained([*BY_TEST_SET, "--epochs", "1"])
    shutil.copytree(whole / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    command = [*BY_TEST_SET, "-cat", "bottle", "--exp_dir", "exp"]
    monkeypatch.setattr(sys, "argv", ["export_model.py", *map(str, command)])
    events = recorded(monkeypatch)
    export_model.main()
    made = {path.name for path in (tmp_path / "results/inference").glob("inference.*")}
    assert set(events[:3]) == {f"flush {name}" for name in made}
    assert set(events[3:6]) == {f"rename {name}" for name in made}
    assert events[6:] == ["flush inference"]


def run_onto_full_disk(code):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)


def test_output_onto_a_full_disk_is_one_line():
    done = run_onto_full_disk("from deploy.common.cli import run_main; run_main(lambda: print('line'))")
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written (No space left on device); make room on its disk\n"


def test_a_training_goes_on_where_its_output_cannot_be_written(tmp_path):
    log = f"log = make_logger(Path({str(tmp_path / 'log')!r}), silent=False)"
    imports = "from pathlib import Path; from utils.log import make_logger"
    done = run_onto_full_disk(f"{imports}; {log}; log.info('line'); log.info('another')")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "log").read_text() == "line\nanother\n"


def test_a_name_too_long_for_any_file_is_one_line(tmp_path):
    code, output = finish(tmp_path, "train", *BY_TEST_SET, "--data", tmp_path, "-cat", "x" * 300)
    assert code == 2
    assert re.fullmatch(r"error: \S*xxx: File name too long\n", output)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delattr(sys, "exception", raising=False)  # as in Python 3.10
    (tmp_path / "train.log").symlink_to("/dev/full")
    logger = make_logger(tmp_path / "train.log", silent=False)
    with pytest.raises(UserError, match=r"train\.log: cannot be written .*No space"):
        logger.info("line")
