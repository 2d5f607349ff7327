"""The commands end to end, as processes, on a tiny model and the committed pictures."""

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import skimage.measure
import sklearn.metrics
import yaml
from PIL import Image

import train
from deploy.backends import load_exported
from deploy.common.cli import UserError
from deploy.common.imaging import decision_line, preprocess, read_rgb
from tests import forked
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.results import UNSTATED

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
# A model small enough for seconds; `pretrained: offline` so that nothing waits for a network.
TINY = ["-o", "input_size=32", "-o", "flow_step=1", "-o", "pretrained=offline"]


def without_weights() -> dict[str, str]:
    """The environment, less the backbone weights that the user may have named in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FASTFLOW_BACKBONE_WEIGHTS", "FASTFLOW_WEIGHTS_"))
    }


class Workplace:
    """A folder like the repository's root, with results of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("configs", "lite_data", "images"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, script: str, *options: object, draws: bool = False) -> subprocess.CompletedProcess:
        return forked.run(script, list(map(str, options)), self.folder, without_weights(), draws)

    def succeed(self, script: str, *options: object, draws: bool = False) -> subprocess.CompletedProcess:
        done = self.run(script, *options, draws=draws)
        assert done.returncode == 0, done.stderr
        return done

    def fail(self, script: str, *options: object) -> str:
        """Run a command that must fail with one line on stderr; return the line."""
        done = self.run(script, *options)
        lines = done.stderr.strip().splitlines()
        assert done.returncode != 0
        assert len(lines) == 1, done.stderr
        return lines[0]

    def train(self, exp_dir: str, *options: object, draws: bool = False) -> subprocess.CompletedProcess:
        common = ("-cfg", "configs/resnet18.yaml", "--data", "./lite_data", "-cat", "bottle", *TINY)
        return self.succeed("train.py", *common, "--exp_dir", exp_dir, *options, draws=draws)

    def evaluate(self, exp_dir: str, *options: object, draws: bool = False) -> subprocess.CompletedProcess:
        common = ("-cfg", "configs/resnet18.yaml", "--data", "./lite_data", *TINY, "--threshold_rule", "f1")
        return self.succeed("eval.py", *common, "--exp_dir", exp_dir, *options, draws=draws)

    def result(self, exp_dir: str, category: str = "bottle") -> dict:
        return json.loads((self.folder / "results" / exp_dir / "eval.json").read_text())["categories"][category]

    def thresholds(self, exp_dir: str, category: str = "bottle") -> dict:
        path = self.folder / "results" / exp_dir / category / "thresholds.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8"))

    def copy_checkpoint(self, exp_dir: str, **changes: object) -> Path:
        """The best checkpoint of `exp` in another experiment, with entries of its own."""
        content = load_checkpoint(self.folder / "results/exp/bottle/best.pdparams")
        path = self.folder / "results" / exp_dir / "bottle/best.pdparams"
        save_checkpoint(path, {**content, **changes})
        return path

    def history(self, exp_dir: str) -> list[dict[str, str]]:
        with open(self.folder / "results" / exp_dir / "bottle" / "history.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A workplace with one training of three epochs, evaluated and exported."""
    workplace = Workplace(tmp_path_factory.mktemp("workplace"))
    workplace.training = workplace.train("exp", "--epochs", 3, "--batch_size", 16, draws=True)
    workplace.evaluate("exp")
    workplace.succeed(
        "deploy/export_model.py", "-cfg", "configs/resnet18.yaml", *TINY, "--exp_dir=exp", "--category=bottle"
    )
    return workplace


@pytest.fixture
def empty(tmp_path):
    return Workplace(tmp_path)


# ---- train.py


def test_training_leaves_its_files(workplace):
    folder = workplace.folder / "results/exp/bottle"
    names = {path.name for path in folder.iterdir()}
    expected = {"best.pdparams", "last.pdparams", "train.log", "config.yaml", "history.csv", "curves.png"}
    assert expected <= names
    assert not any(name.startswith(".") for name in names), "temporary files are left"
    assert read_rgb(folder / "curves.png").shape == (450, 1000, 3)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["input_size"] == 32
    assert config["epochs"] == 3


def test_training_logs_the_published_line(workplace):
    pattern = (
        r"bottle  Epoch 1 - iter:1/2 - lr:0\.001 - loss = -?\d+\.\d{3}/-?\d+\.\d{3} \(last/avg\) - "
        r"avg_reader_cost: \d+\.\d{5} sec - avg_batch_cost: \d+\.\d{5} sec - avg_samples: 16 - "
        r"avg_ips: \d+\.\d{5} images/sec"
    )
    log = (workplace.folder / "results/exp/bottle/train.log").read_text()
    assert re.search(pattern, log)
    assert log == workplace.training.stdout


def test_training_without_weights_says_so_loudly(workplace):
    assert "NO IMAGENET WEIGHTS" in workplace.training.stderr
    assert "--backbone_weights" in workplace.training.stderr


def test_same_seed_same_losses_other_seed_other_losses(workplace):
    workplace.train("again", "--epochs", 2, "--batch_size", 16)
    workplace.train("other", "--epochs", 1, "--batch_size", 16, "-o", "seed=1")
    losses = [row["loss"] for row in workplace.history("exp")]
    assert [row["loss"] for row in workplace.history("again")] == losses[:2]
    assert workplace.history("other")[0]["loss"] != losses[0]


def test_losses_do_not_depend_on_the_cache(workplace):
    workplace.train("uncached", "--epochs", 3, "--batch_size", 16, "--cache_memory", 0, "--cache_disk", 0)
    losses = [[float(row["loss"]) for row in workplace.history(name)] for name in ("uncached", "exp")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_resume_goes_on_to_the_same_losses(workplace):
    # Whoever starts it again after a kill gives --resume always, also when that was in the first epoch.
    done = workplace.train("stopped", "--epochs", 2, "--batch_size", 16, "--resume")
    assert "no results/stopped/bottle/last.pdparams to go on from: starting at epoch 1" in done.stdout
    workplace.train("stopped", "--epochs", 3, "--batch_size", 16, "--resume")
    whole, resumed = workplace.history("exp"), workplace.history("stopped")
    for key in ("epoch", "loss", "image_auroc", "pixel_auroc"):
        assert [row[key] for row in resumed] == [row[key] for row in whole], key


def test_evaluates_every_n_epochs_and_at_the_end(workplace):
    workplace.train("every2", "--epochs", 3, "--batch_size", 24, "--test_epochs", 2)
    assert [bool(row["image_auroc"]) for row in workplace.history("every2")] == [False, True, True]


def test_patience_stops(workplace):
    done = workplace.train("patient", "--epochs", 40, "--batch_size", 24, "-o", "patience=1")
    rows = workplace.history("patient")
    assert len(rows) < 40
    assert "no new best for 1 epochs" in done.stdout


def test_divergence_is_one_line_and_keeps_the_last_good_checkpoint(workplace):
    workplace.train("nan", "--epochs", 1, "--batch_size", 24)
    before = (workplace.folder / "results/nan/bottle/last.pdparams").read_bytes()
    options = ("-cfg", "configs/resnet18.yaml", "--data", "lite_data", "-cat", "bottle", *TINY, "--exp_dir", "nan")
    done = workplace.run("train.py", *options, "--resume", "--epochs", 3, "-o", "lr=1e30")
    warning, error = done.stderr.splitlines()
    assert "lr 0.001 is now 1e+30" in warning
    assert "diverged" in error
    assert done.returncode != 0
    assert (workplace.folder / "results/nan/bottle/last.pdparams").read_bytes() == before


def test_resume_refuses_other_settings_of_the_model(workplace):
    options = ("-cfg", "configs/resnet18.yaml", "--data", "lite_data", "-cat", "bottle", *TINY, "--exp_dir", "exp")
    line = workplace.fail("train.py", *options, "--resume", "--epochs", "4", "-o", "clamp=0.5")
    assert "trained with clamp 2.0" in line
    line = workplace.fail("train.py", *options, "--resume", "--backbone_weights", "some.npz")
    assert "--backbone_weights" in line


def test_patience_waits_for_the_next_evaluation(workplace):
    workplace.train("patient2", "--epochs", 6, "--batch_size", 24, "--test_epochs", 3, "-o", "patience=1")
    assert len(workplace.history("patient2")) == 6


def parameters(workplace):
    """How many numbers the training said that it changes."""
    return re.search(r"trainable parameters: ([\d,]+)", workplace.training.stdout)[1].replace(",", "")


def test_training_ends_with_the_published_lines(workplace):
    rows = workplace.history("exp")
    best = load_checkpoint(workplace.folder / "results/exp/bottle/best.pdparams")["epoch"]
    image, pixel = (np.round(float(rows[best - 1][f"{kind}_auroc"]), 3) for kind in ("image", "pixel"))
    *before, seconds, saved, bottle, mean = workplace.training.stdout.splitlines()
    assert re.fullmatch(r"Training time \d:\d\d:\d\d", seconds) and saved == "save:exp"
    assert bottle == f"bottle           pixel auroc:{pixel:.3f}    image auroc:{image:.3f}"
    assert mean == f"mean             pixel auroc:{pixel:.4f}    image auroc:{image:.4f}"
    evaluations = [line for line in before if line.startswith("EVAL:  image-auc : ")]
    assert len(evaluations) == 3 and f"EVAL:  image-auc : {image:.6f} pixel-auc:{pixel:.6f}" in evaluations


def test_every_iteration_is_logged_with_the_plain_mean(workplace):
    """The second batch has 8 pictures of 24, and its loss counts as much as that of the first."""
    pattern = r"iter:(\d)/2 - .* loss = (-?\d+\.\d{3})/(-?\d+\.\d{3}) "
    (_, first, _), (_, second, average), *_ = re.findall(pattern, workplace.training.stdout)
    assert float(average) == pytest.approx((float(first) + float(second)) / 2, abs=0.0011)
    assert float(workplace.history("exp")[0]["loss"]) == pytest.approx(float(average), abs=0.0006)


def test_never_evaluated(workplace):
    done = workplace.train("never", "--epochs", 2, "--batch_size", 24, "--test_epochs", -1, "-o", "patience=1")
    assert [row["image_auroc"] for row in workplace.history("never")] == ["", ""]
    assert "never evaluated (-1): best.pdparams is the last epoch, and all epochs are trained" in done.stdout
    assert done.stdout.splitlines()[-2] == "bottle           pixel auroc:n/a    image auroc:n/a"
    assert "selection: last (last checkpoint, no choice)" in workplace.evaluate("never").stdout


def test_training_all_is_for_another_command(empty):
    assert "sh train.sh" in empty.fail("train.py", "-cat", "all")


# ---- train.py: how it ends, and what it says of that


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "stops 30 epochs after the best; press Ctrl-C and go on with --resume"),
        ({"patience": 5}, "stops 5 epochs after the best; press Ctrl-C and go on with --resume"),
        ({"selection": "last", "epochs": 40}, "trains all 40 epochs; press Ctrl-C and go on with --resume"),
        ({"eval_interval": -1}, "never evaluated (-1): best.pdparams is the last epoch, and all epochs are trained"),
    ],
)
def test_the_first_lines_say_when_it_stops(config, changes, line):
    model = SimpleNamespace(trainable_parameters=lambda: 1000)
    said = []
    config = dataclasses.replace(config, **changes)
    training = SimpleNamespace(config=config, backbone=UNSTATED, model=model, last_epoch=lambda pictures: config.epochs)
    pictures = SimpleNamespace(notes=[], train=[], held_out=[], category=SimpleNamespace(test=[]), layout=config.layout)
    train.introduce(training, pictures, range(24), said.append)
    assert said[-1] == line


def interrupted(place, *options, at_rename, draws=True):
    """Ctrl-C while train.py gives its n-th file its name; its process, with what it said."""
    common = ["-cfg", "configs/resnet18.yaml", "--data", "./lite_data", *TINY, "--exp_dir", "exp"]
    common += ["--epochs", "9", "--batch_size", "24", *map(str, options)]
    hazards = {"kill_at_rename": at_rename, "signal_at_rename": signal.SIGINT}
    process = forked.start("train", common, place.folder, without_weights(), draws=draws, **hazards)
    process.join(100)
    said = [path.read_text() for path in forked.outputs(place.folder, process.pid)]
    assert process.exitcode == 130, said
    assert not list(place.folder.rglob(".*"))
    return said[0], said[1].partition("error: interrupted\n")[2].splitlines()


def test_ctrl_c_draws_the_curves_and_says_how_to_go_on(empty):
    """In the second epoch, while its checkpoint is written: the files of the first are four."""
    _, (state, command) = interrupted(empty, at_rename=5)
    folder = empty.folder / "results/exp/bottle"
    assert state == "the epochs so far are in results/exp/bottle; go on with"
    assert command.endswith(" --resume")
    assert read_rgb(folder / "curves.png").shape == (450, 1000, 3)
    assert len(empty.history("exp")) == 1
    assert len(interrupted(empty, "--resume", at_rename=6)[0].splitlines()) > 5
    assert len(empty.history("exp")) == 2


def test_ctrl_c_in_the_first_epoch_says_that_none_is_done(empty):
    _, (state, command) = interrupted(empty, at_rename=1)  # of the first checkpoint
    assert state == "no epoch is done yet; start again with"
    assert "--resume" not in command
    assert [path.name for path in (empty.folder / "results/exp/bottle").iterdir()] == ["train.log"]


def test_a_second_ctrl_c_ends_it_at_once(empty, monkeypatch):
    """Here it comes in the drawing of the curves, which the first one asked for."""

    class Interrupted:
        history = ("a row",)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "draw_curves", interrupt)
    with pytest.raises(KeyboardInterrupt, match="go on with"), train.saying_how_to_go_on(Interrupted, Path(), True):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        ("python train.py -cat bottle", "python train.py -cat bottle --resume"),
        ("python train.py --resume -cat 'my part'", "python train.py -cat 'my part' --resume"),
        ("python -u train.py --backbone_weights 'a b.npz' -o lr=1e-4", "python -u train.py -o lr=1e-4 --resume"),
        (
            "python train.py --test_epochs -1 --backbone_w=w.npz --amp",
            "python train.py --test_epochs -1 --amp --resume",
        ),
        ("python train.py --batch_size 8 --res", "python train.py --batch_size 8 --resume"),
    ],
)
def test_the_command_that_goes_on(monkeypatch, typed, again):
    monkeypatch.setattr(sys, "orig_argv", shlex.split(typed))
    assert train.command_again(resume=True) == again
    assert train.command_again(resume=False) == typed


def test_the_command_that_is_said_goes_on(empty):
    """Pasted into a shell, from a real process that the terminal's Ctrl-C ends."""
    folder = empty.folder / "re sults"
    folder.mkdir()
    empty = Workplace(folder)
    weights = npz(folder)
    command = [sys.executable, ROOT / "train.py", "-cfg", "configs/resnet18.yaml", "--data", "lite_data", *TINY]
    command += ["--exp_dir", "an exp", "--epochs", "3", "--batch_size", "24", "--backbone_weights", weights]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "best epoch: " in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        error, _, again = process.stderr.read().splitlines()
    assert (process.returncode, error) == (130, "error: interrupted")
    assert (folder / "results/an exp/bottle/curves.png").exists()
    subprocess.run(again, shell=True, cwd=folder, check=True, capture_output=True, timeout=200)
    assert len(empty.history("an exp")) == 3


# ---- train.py: where there is a training already


def test_training_again_puts_the_earlier_one_aside(workplace):
    options = ("--epochs", 1, "--batch_size", 24)
    workplace.train("twice", *options)
    folder = workplace.folder / "results/twice"
    for name in ("thresholds.yaml", "predictions/a.jpg"):
        (folder / "bottle" / name).parent.mkdir(exist_ok=True)
        (folder / "bottle" / name).write_text("of the first")
    first = {path.name: path.read_bytes() for path in (folder / "bottle").iterdir() if path.is_file()}
    for aside in ("bottle.old", "bottle.old2"):
        done = workplace.train("twice", *options, "-o", "seed=1")
        assert f"bottle  the training that was here is kept in results/twice/{aside}\n" in done.stdout
        assert (folder / "bottle/train.log").read_text() == done.stdout
    assert {path.name for path in folder.iterdir()} == {"bottle", "bottle.old", "bottle.old2"}
    kept = folder / "bottle.old"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == first
    assert (kept / "predictions/a.jpg").exists()
    assert not (folder / "bottle/thresholds.yaml").exists()
    assert not list(folder.rglob(".*"))
    assert "kept in" not in workplace.train("twice", *options, "--resume", "-o", "seed=1").stdout


def test_a_best_checkpoint_alone_is_a_training_too(workplace):
    """A published one, for example, which --resume cannot go on from."""
    best = workplace.copy_checkpoint("alone")
    content = best.read_bytes()
    done = workplace.train("alone", "--epochs", 1, "--batch_size", 24, "--resume")
    assert "bottle  the training that was here is kept in results/alone/bottle.old\n" in done.stdout
    assert "no results/alone/bottle/last.pdparams to go on from: starting at epoch 1" in done.stdout
    assert [path.read_bytes() for path in best.parent.with_name("bottle.old").iterdir()] == [content]


def test_an_earlier_training_that_cannot_be_put_aside_is_one_line(workplace, monkeypatch):
    """Of another user in a folder with the sticky bit, for example."""
    best = workplace.copy_checkpoint("stuck")
    content = best.read_bytes()

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(os, "rename", refuse)
    options = f"train.py -cfg configs/resnet18.yaml --data lite_data --exp_dir stuck {' '.join(TINY)} --epochs 1"
    monkeypatch.setattr(sys, "argv", options.split())
    with pytest.raises(UserError, match=r"results/stuck/bottle: cannot be renamed to bottle\.old"):
        train.main()
    assert best.read_bytes() == content


# ---- eval.py


def test_eval_prints_the_table_and_agrees_with_the_training(workplace):
    done = workplace.succeed(
        "eval.py", "-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "all", "--exp_dir", "exp/"
    )
    result = json.loads((workplace.folder / "results/exp/eval.json").read_text())
    bottle = result["categories"]["bottle"]
    best = workplace.history("exp")[bottle["epoch"] - 1]
    assert math.isclose(bottle["image_auroc"], float(best["image_auroc"]), abs_tol=1e-6)
    assert math.isclose(bottle["pixel_auroc"], float(best["pixel_auroc"]), abs_tol=1e-6)
    assert result["mean"]["image_auroc"] == bottle["image_auroc"]
    assert bottle["images"] == 26
    assert bottle["anomalous_images"] == 18
    assert bottle["backbone"]["source"] == "offline start"
    lines = done.stdout.splitlines()
    image, pixel = (np.round(bottle[f"{kind}_auroc"], 3) for kind in ("image", "pixel"))
    assert lines[0] == f"Model A.D. Param#: {parameters(workplace)}"
    assert f"EVAL:  image-auc : {image:.6f} pixel-auc:{pixel:.6f}" in lines
    row = f"  pixel auroc:{pixel:.3f}   image auroc:{image:.3f}"
    assert lines[-2:] == [f"bottle         {row}", f"all            {row}"]
    assert sum("auroc:" in line for line in lines) == 2


def test_eval_last(workplace):
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "bottle", "--exp_dir", "exp")
    workplace.succeed("eval.py", *options, "--is_last")
    bottle = json.loads((workplace.folder / "results/exp/eval.json").read_text())["categories"]["bottle"]
    assert bottle["epoch"] == 3
    assert bottle["checkpoint"].endswith("last.pdparams")


def test_a_category_that_fails_does_not_stop_the_others(workplace, tmp_path):
    for name in ("aaa", "bottle"):
        (tmp_path / name).symlink_to(ROOT / "lite_data/bottle")
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", tmp_path, "-cat", "all", "--exp_dir", "exp")
    done = workplace.run("eval.py", *options)
    assert done.returncode != 0
    assert "aaa" in done.stderr
    assert "bottle" in done.stdout


def literal_aupro(scores, masks, limit=0.3):
    """MVTec's own way: every pixel is a step of both rates, in order of its score; ties make one step."""
    overlap = np.zeros(scores.shape)
    regions = 0
    for share, mask in zip(overlap, masks, strict=True):
        for region in skimage.measure.regionprops(skimage.measure.label(mask, connectivity=2)):
            share[tuple(region.coords.T)] = 1 / region.area
            regions += 1
    order = scores.ravel().argsort()[::-1]
    ascending = np.append(scores.ravel()[order], -1)
    last = np.flatnonzero(np.diff(ascending))  # of each group of equal scores
    rates = [
        np.append(0, (step.ravel()[order].cumsum() / total)[last])
        for step, total in ((~masks, (~masks).sum()), (overlap, regions))
    ]
    inside = rates[0] < limit
    x, y = np.append(rates[0][inside], limit), np.append(rates[1][inside], np.interp(limit, *rates))
    return np.trapezoid(y, x) / limit


def best_f1(labels, scores):
    """F1 and the lowest accepted score, from scikit-learn's curve."""
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return f1.max(), thresholds[f1[:-1] > f1.max() - 1e-12].min()


def test_all_figures_are_recomputed_from_saved_maps_without_our_code(workplace):
    workplace.evaluate("exp", "--save_maps")
    figures = workplace.result("exp")
    with np.load(workplace.folder / "results/exp/bottle/maps.npz") as maps:
        arrays = dict(maps)
    maps, masks = arrays["smoothed"], arrays["masks"]
    assert maps.shape == masks.shape == (26, 32, 32)
    assert maps.dtype == arrays["image_scores"].dtype == np.float32
    assert arrays["paths"].tolist() == sorted(arrays["paths"].tolist())
    assert all((workplace.folder / path).is_file() for path in arrays["paths"])
    pairs = {"image": (arrays["labels"], arrays["image_scores"]), "pixel": (masks.ravel(), maps.ravel())}
    expected = {"aupro": literal_aupro(maps, masks)}
    for kind, (labels, scores) in pairs.items():
        expected[f"{kind}_auroc"] = sklearn.metrics.roc_auc_score(labels, scores)
        expected[f"{kind}_ap"] = sklearn.metrics.average_precision_score(labels, scores)
        expected[f"{kind}_f1_max"], expected[f"{kind}_f1_threshold"] = best_f1(labels, scores)
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value, abs=1e-6), key
    assert 0 < figures["aupro"] < 1


def test_eval_prints_all_figures_on_demand(workplace):
    lines = workplace.evaluate("exp", "--all_metrics").stdout.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("category "))
    title, bottle, _, by_defect, *defects = lines[row : row + 7]
    keys = ["pixel_auroc", "image_auroc", "image_ap", "pixel_ap", "image_f1_max", "pixel_f1_max", "aupro"]
    assert re.split(" {2,}", title) == ["category", *(key.replace("_", " ").replace("f1 ", "f1-") for key in keys)]
    assert bottle.split() == ["bottle", *(f"{workplace.result('exp')[key]:.3f}" for key in keys)]
    assert re.split(" {2,}", by_defect) == ["category", "defect", "pixel auroc", "image auroc", "aupro", "missed"]
    for line, (name, figures) in zip(defects, workplace.result("exp")["defects"].items(), strict=True):
        values = [f"{figures[key]:.3f}" for key in ("pixel_auroc", "image_auroc", "aupro")]
        assert line.split() == ["bottle", name, *values, str(figures["missed_defects"]), "of", "6"]
    assert "selection: test_auroc (best checkpoint chosen on the test set)" in lines


def test_eval_leaves_tables_and_pictures(workplace):
    workplace.evaluate("exp", draws=True)
    folder = workplace.folder / "results/exp"
    figures = workplace.result("exp")
    with open(folder / "eval.csv", newline="") as file:
        first, mean, *_ = csv.DictReader(file)
    for key in ("image_auroc", "pixel_ap", "aupro"):
        assert float(first[key]) == float(mean[key]) == figures[key]
    text = (folder / "eval.md").read_text()
    assert f"| bottle | {100 * figures['pixel_auroc']:.2f} | {100 * figures['image_auroc']:.2f} |" in text
    assert "98.0" in text
    assert "over 1 category" in text
    pictures = {path.name: read_rgb(path) for path in (folder / "bottle/evaluation").iterdir()}
    assert set(pictures) == {"roc.png", "scores.png", "highest_good.jpg", "lowest_defect.jpg"}
    assert (pictures["roc.png"].shape, pictures["scores.png"].shape) == ((500, 500, 3), (400, 900, 3))


def test_eval_stores_thresholds_that_give_the_f1s_of_the_table(workplace):
    done = workplace.evaluate("exp")
    stored, figures = workplace.thresholds("exp"), workplace.result("exp")
    assert stored["rule"] == "f1"
    assert stored["pixel_threshold"] == figures["pixel_f1_threshold"]
    assert stored["image_threshold"] < figures["image_f1_threshold"]  # half-way down to the next score
    for kind in ("image", "pixel"):
        assert stored["figures"][f"{kind}_f1"] == pytest.approx(figures[f"{kind}_f1_max"], abs=1e-12)
    assert (stored["figures"]["good_test_pictures"], stored["figures"]["defect_test_pictures"]) == (8, 18)
    assert stored["data"] == {"folder": "lite_data/bottle/test", "pictures": 26, "defects": 18}
    assert (stored["checkpoint"], stored["epoch"]) == ("best.pdparams", figures["epoch"])
    assert "results/exp/bottle/thresholds.yaml" in done.stdout


def test_the_order_of_the_published_readme(workplace):
    """Train, evaluate, predict: nothing is calibrated, and prediction says nothing but the decision at 0.8."""
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--exp_dir", "order")
    workplace.copy_checkpoint("order")
    done = workplace.succeed("eval.py", *options, "--data", "lite_data")
    assert "threshold" not in done.stdout
    decisions = workplace.result("order")["decisions"]
    with np.load(saved_maps(workplace, "order")) as maps:
        good, defect = maps["image_scores"][~maps["labels"]], maps["image_scores"][maps["labels"]]
    assert (decisions["rule"], decisions["image"], decisions["pixel"]) == ("published", 0.8, 0.8)
    assert (decisions["false_alarms"], decisions["good_test_pictures"]) == ((good > 0.8).sum(), 8)
    assert (decisions["missed_defects"], decisions["defect_test_pictures"]) == ((defect <= 0.8).sum(), 18)
    lines = workplace.succeed("predict.py", *options, "--image_path", "images/bottle_good.png").stdout.splitlines()
    label = "Anomaly" if float(lines[0][-5:]) > 0.8 else "Normal"
    assert lines[0].startswith(f"{label} - score:  ") and len(lines) == 2
    assert lines[1] == "可视化图在results/order/bottle下"
    exported = ("--save_inference_dir", "results/order/inference")
    done = workplace.succeed("deploy/export_model.py", *options, *exported)
    assert done.stdout == "inference model has been saved into results/order/inference\n"
    done = workplace.succeed("deploy/infer.py", *exported)  # of images/bottle_bad.png
    assert re.fullmatch(r"(Normal|Anomaly) - score:  \d\.\d{3}\n", done.stdout)


def saved_maps(workplace, exp_dir):
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "--exp_dir", exp_dir)
    workplace.succeed("eval.py", *options, "--save_maps")
    return workplace.folder / "results" / exp_dir / "bottle/maps.npz"


def test_what_was_calibrated_last_is_used_until_it_is_withdrawn(workplace):
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--exp_dir", "withdrawn")
    picture = ("--image_path", "images/bottle_good.png")
    workplace.copy_checkpoint("withdrawn")
    workplace.evaluate("withdrawn")
    assert "(f1)" in workplace.succeed("predict.py", *options, *picture).stdout.splitlines()[0]
    done = workplace.succeed("eval.py", *options, "--data", "lite_data")  # which calibrates nothing, and takes nothing
    assert "predict.py and export go on with image " in done.stdout
    assert "(f1)" in workplace.succeed("predict.py", *options, *picture).stdout.splitlines()[0]
    workplace.succeed("eval.py", *options, "--data", "lite_data", "--threshold_rule", "published")
    assert len(workplace.succeed("predict.py", *options, *picture).stdout.splitlines()) == 2


def test_the_last_checkpoint_has_no_thresholds(workplace):
    path = workplace.folder / "results/exp/bottle/thresholds.yaml"
    before = path.read_bytes()
    done = workplace.evaluate("exp", "--is_last")
    assert path.read_bytes() == before
    assert "best.pdparams only" in done.stdout
    assert workplace.result("exp")["selection"] == "last"


def test_thresholds_from_good_pictures_that_training_did_not_use(workplace):
    held_out = [f"{i:03d}.png" for i in range(24)]
    workplace.copy_checkpoint("quantile", held_out=held_out)
    done = workplace.evaluate("quantile", "--threshold_rule", "quantile", "--false_alarm_rate", "0.2")
    stored = workplace.thresholds("quantile")
    assert (stored["rule"], stored["false_alarm_rate"]) == ("quantile", 0.2)
    assert stored["data"] == {"folder": "lite_data/bottle/train/good", "pictures": 24, "defects": 0}
    lines = workplace.succeed(
        "predict.py",
        "-cfg",
        "configs/resnet18.yaml",
        *TINY,
        "-cat",
        "bottle",
        "--exp_dir",
        "quantile",
        "--image_path",
        "lite_data/bottle/train/good",
    ).stdout.splitlines()
    assert lines[0].startswith(f"thresholds: image {stored['image_threshold']:.3f} (quantile), pixel ")
    assert lines[0].endswith("; results/quantile/bottle/thresholds.yaml")
    # the 20th of 24, k = ceil(25 * 0.8); a picture's score may differ in the last digits from that in its batch
    assert sum("Anomaly" in line for line in lines) in (4, 5)
    assert not done.stderr
    done = workplace.evaluate("quantile", "--threshold_rule", "quantile", "--false_alarm_rate", "0.01")
    assert "24 held-out pictures cannot promise a false-alarm rate of 0.01" in done.stderr
    assert workplace.thresholds("quantile")["false_alarm_rate"] == 1 / 25


def test_a_category_without_test_pictures_can_be_calibrated(workplace, tmp_path):
    workplace.copy_checkpoint("untested", held_out=["003.png", "017.png"])
    (tmp_path / "bottle/train").mkdir(parents=True)
    (tmp_path / "bottle/train/good").symlink_to(ROOT / "lite_data/bottle/train/good")
    options = ("--data", tmp_path, "--threshold_rule", "quantile", "--false_alarm_rate", "0.5", "--save_maps")
    done = workplace.evaluate("untested", *options)
    assert done.stdout.splitlines()[-2] == "bottle           pixel auroc:n/a   image auroc:n/a"
    assert workplace.thresholds("untested")["figures"]["image_f1"] is None
    assert workplace.result("untested")["images"] == 0
    assert done.stderr == "warning: bottle: has no test pictures, so there is no AUROC\n"
    done = workplace.evaluate("untested", "--data", tmp_path)
    rule, lacking = done.stderr.splitlines()
    assert "--threshold_rule quantile" in rule
    assert lacking == "warning: bottle: has no test pictures, so there is no AUROC"


def test_what_can_be_found_is_said_at_the_end_of_a_training_and_on_demand(workplace):
    done = workplace.train("seen", *AUTO, "--epochs", 1)
    folder = workplace.folder / "results/seen/bottle"
    content = json.loads((folder / "sensitivity.json").read_text())
    assert f"bottle  {content['line']}" in done.stdout.splitlines()
    assert re.match(r"spots of .* px \(of 256 px\) .* false alarm rate of 0.33 \(", content["line"])
    assert (folder / "sensitivity.png").exists()
    options = ("-cfg", folder / "config.yaml", "--data", "lite_data", "-cat", "bottle", "--exp_dir", "seen")
    workplace.succeed("eval.py", *options)  # sets the same threshold, so what train.py measured holds
    assert workplace.result("seen")["sensitivity"]["line"] == content["line"]
    assert content["line"] in (folder / "report.html").read_text()
    done = workplace.succeed("eval.py", *options, "--false_alarm_rate", "0.7")
    assert workplace.result("seen")["sensitivity"] is None
    done = workplace.succeed("eval.py", *options, "--false_alarm_rate", "0.7", "--sensitivity")
    measured = workplace.result("seen")["sensitivity"]
    assert measured["false_alarm_rate"] == 0.7
    assert f"bottle: {measured['line']}" in done.stdout.splitlines()
    assert len(re.findall(r"^ +\d+ +\d+ .* of \d+", done.stdout, re.MULTILINE)) > 5


def test_without_held_out_pictures_nothing_is_said_of_what_can_be_found(workplace):
    folder = workplace.folder / "results/exp/bottle"
    assert not (folder / "sensitivity.json").exists()
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "bottle", "--exp_dir", "exp")
    before = (folder / "report.html").read_bytes()
    line = workplace.fail("eval.py", *common, "--sensitivity")
    assert "results/exp/bottle/best.pdparams: --sensitivity needs good pictures" in line
    assert (folder / "report.html").read_bytes() == before


def test_the_report_tells_what_was_learnt_from_and_how_to_repeat_it(workplace):
    text = (workplace.folder / "results/exp/bottle/report.html").read_text()
    assert "24 good pictures (24 of 256x256); 0 held out; sha256 of the list of names " in text
    assert "python train.py -cfg results/exp/bottle/config.yaml --data lite_data --exp_dir exp -cat bottle" in text


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, [], ["results/bad/bottle/best.pdparams", "auto.yaml"]),
        ({"held_out": ["000.png", "nowhere.png"]}, [], ["nowhere.png"]),
        ({}, ["--false_alarm_rate", "1"], ["--false_alarm_rate", "between 0 and 1"]),
        ({}, ["--false_alarm_rate", "nan"], ["--false_alarm_rate", "between 0 and 1"]),
        ({}, ["--false_alarm_rate", "0.1", "--threshold_rule", "f1"], ["--false_alarm_rate", "quantile"]),
        ({}, ["--threshold_rule", "median"], ["--threshold_rule"]),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_nothing_is_written(workplace, changes, options, words):
    path = workplace.copy_checkpoint("bad", **changes)
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "bottle", "--exp_dir", "bad")
    line = workplace.fail("eval.py", *common, "--threshold_rule", "quantile", *options)
    assert all(word in line for word in words)
    assert list(path.parent.iterdir()) == [path]
    assert list(path.parent.parent.iterdir()) == [path.parent]


def test_eval_keeps_the_categories_that_it_did_not_evaluate(workplace):
    path = workplace.folder / "results/exp/eval.json"
    other = {"pixel_auroc": 0.25, "image_auroc": None}
    path.write_text(json.dumps({"mean": {}, "categories": {"other": other}}))
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "bottle", "--exp_dir", "exp")
    workplace.succeed("eval.py", *options)
    result = json.loads(path.read_text())
    bottle = result["categories"]["bottle"]
    assert result["categories"]["other"] == other
    assert result["mean"]["pixel_auroc"] == (0.25 + bottle["pixel_auroc"]) / 2
    assert result["mean"]["image_auroc"] == bottle["image_auroc"]


def test_eval_refuses_settings_of_another_training(workplace):
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "--data", "lite_data", "-cat", "bottle", "--exp_dir", "exp")
    line = workplace.fail("eval.py", *options, "-o", "input_size=96")
    assert "best.pdparams" in line
    assert "trained with input_size 32" in line


# ---- predict.py and deploy/infer.py


def predict(workplace, *options):
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "--category", "bottle", "--exp_dir", "exp")
    return workplace.succeed("predict.py", *common, *options).stdout


def test_predict_and_infer_print_the_same_score(workplace):
    for name in ("bottle_good", "bottle_bad"):
        which, first, second = predict(workplace, "--image_path", f"images/{name}.png").splitlines()
        assert re.fullmatch(r"(Normal|Anomaly) - score:  \d\.\d{3}", first)
        assert second == "可视化图在results/exp/bottle下"
        options = ("-cfg", "configs/resnet18.yaml", "--save_inference_dir", "./results/inference")
        done = workplace.succeed("deploy/infer.py", *options, "--use_gpu", "True", "--image_path", f"images/{name}.png")
        said, decision = done.stdout.splitlines()
        assert said == which.replace("exp/bottle/thresholds.yaml", "inference/inference.yml")
        assert decision == first
        if not paddle.is_compiled_with_cuda():
            assert done.stderr.strip() == "warning: --use_gpu True: Paddle sees no GPU here; running on the CPU"
    assert (workplace.folder / "results/exp/bottle/result.jpg").stat().st_size > 1000


def test_the_threshold_decides(workplace):
    picture = ("--image_path", "images/bottle_bad.png", "--pixel_threshold", "0.5")
    assert predict(workplace, *picture, "--image_threshold", "0").startswith("Anomaly")
    assert predict(workplace, *picture, "--image_threshold", "1").startswith("Normal")


def test_predict_says_which_thresholds_it_uses(workplace):
    stored = workplace.thresholds("exp")
    image, pixel = (f"{kind} {stored[f'{kind}_threshold']:.3f} (f1)" for kind in ("image", "pixel"))
    file = "results/exp/bottle/thresholds.yaml"
    picture = ("--image_path", "images/bottle_bad.png")
    assert predict(workplace, *picture).splitlines()[0] == f"thresholds: {image}, {pixel}; {file}"
    lines = predict(workplace, *picture, "--pixel_threshold", "0.25").splitlines()
    assert lines[0] == f"thresholds: {image}, pixel 0.250 (--pixel_threshold); {file}"
    assert len(lines) == 3


def test_predict_decides_as_the_evaluation_did(workplace):
    figures = workplace.thresholds("exp")["figures"]
    lines = predict(workplace, "--image_path", "lite_data/bottle/test/*/*.png").splitlines()
    good = [line for line in lines if line.startswith("lite_data/bottle/test/good/")]
    assert sum("Anomaly" in line for line in good) == figures["false_alarms"]
    missed = sum("Normal" in line for line in set(lines) - set(good))
    # The defect at the threshold may fall below it: rounding depends on the batch where there is no oneDNN.
    assert missed - figures["missed_defects"] in (0, 1)


def test_without_thresholds_of_the_checkpoint_the_published_ones_hold(workplace):
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "-cat", "bottle", "--exp_dir", "fresh")
    picture = ("--image_path", "images/bottle_bad.png")
    export = ("--save_inference_dir", "results/fresh/inference")
    path = workplace.copy_checkpoint("fresh")
    done = workplace.succeed("predict.py", *common, *picture)
    assert len(done.stdout.splitlines()) == 2
    assert not done.stderr
    shutil.copy(workplace.folder / "results/exp/bottle/thresholds.yaml", path.parent)
    workplace.copy_checkpoint("fresh", epoch=99)
    done = workplace.succeed("predict.py", *common, *picture)
    assert len(done.stdout.splitlines()) == 2
    assert "another checkpoint" in done.stderr
    workplace.succeed("deploy/export_model.py", *common, *export)
    description = yaml.safe_load((workplace.folder / "results/fresh/inference/inference.yml").read_text())
    assert description["threshold_rule"] == description["pixel_threshold_rule"] == "published"
    assert description["image_threshold"] == description["pixel_threshold"] == 0.8
    (path.parent / "thresholds.yaml").write_text("rule: f1")
    for script, more in (("predict.py", picture), ("deploy/export_model.py", export)):
        assert "thresholds.yaml: damaged" in workplace.fail(script, *common, *more)
    options = ("--image_threshold", "0.5", "--pixel_threshold", "0.5")  # nothing is wanted of the file then
    assert len(workplace.succeed("predict.py", *common, *picture, *options).stdout.splitlines()) == 2


def test_the_exported_model_carries_the_thresholds(workplace, tmp_path):
    # As where the defects have no masks: one rule for pictures, another for pixels.
    (workplace.folder / "results/mixed/bottle").mkdir(parents=True)
    for name in ("best.pdparams", "thresholds.yaml"):
        shutil.copy(workplace.folder / "results/exp/bottle" / name, workplace.folder / "results/mixed/bottle")
    stored = {**workplace.thresholds("exp"), "pixel_threshold": 0.8, "pixel_rule": "published"}
    (workplace.folder / "results/mixed/bottle/thresholds.yaml").write_text(yaml.safe_dump(stored))
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "-cat", "bottle", "--exp_dir", "mixed")
    workplace.succeed("deploy/export_model.py", *common, "--save_inference_dir", "results/mixed/inference")
    folder = workplace.folder / "results/mixed/inference"
    description = yaml.safe_load((folder / "inference.yml").read_text())
    assert (description["threshold_rule"], description["pixel_threshold_rule"]) == ("f1", "published")
    for key in ("image_threshold", "pixel_threshold"):
        assert description[key] == stored[key]
    older = shutil.copytree(folder, tmp_path / "older")  # an export from before there was a rule
    del description["threshold_rule"], description["pixel_threshold_rule"]
    (older / "inference.yml").write_text(yaml.safe_dump(description))
    picture = ("--image_path", "images/bottle_bad.png")
    for model in (folder, older):
        done = workplace.succeed("deploy/infer.py", "--save_inference_dir", model, *picture)
        said, decision = done.stdout.splitlines()
        assert decision == predict(workplace, *picture).splitlines()[1]
        rules = ("f1", "published") if model == folder else ("not stated", "not stated")
        assert re.sub(r"\d\.\d+", "T", said).startswith("thresholds: image T ({}), pixel T ({});".format(*rules))


def test_predict_a_folder_and_a_pattern(workplace):
    lines = predict(workplace, "--image_path", "lite_data/bottle/test/good").splitlines()
    assert len(lines) == 11
    assert lines[1].startswith("lite_data/bottle/test/good/000.png  ")
    assert lines[-2] == f"{sum('Anomaly' in line for line in lines)} of 8 anomalies"
    assert lines[-1] == "可视化图在results/exp/bottle/predictions下"
    assert (workplace.folder / "results/exp/bottle/predictions/007.png.jpg").exists()
    predict(workplace, "--image_path", "lite_data/bottle/test/*/000.png")
    assert (workplace.folder / "results/exp/bottle/predictions/broken_small/000.png.jpg").exists()


def test_several_paths_to_a_folder_and_json_of_their_own(workplace, tmp_path):
    """Files, a folder and a pattern; the same from predict.py and infer.py."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "sub.png")
    (tmp_path / "x").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "x/a.png")
    given = [tmp_path / "a.png", tmp_path / "x", f"{tmp_path}/a.*", tmp_path / "x/../a.png", "images/bottle_bad.png"]
    expected = [*(str(tmp_path / name) for name in ("a.png", "x/a.png", "a.jpg")), "images/bottle_bad.png"]
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "--exp_dir", "exp")
    model = ("--save_inference_dir", "results/inference")
    rows = {}
    for script, options in (("predict.py", common), ("deploy/infer.py", model)):
        target = tmp_path / script.replace("/", "-")
        done = workplace.succeed(
            *(script, *options, "--image_path", *given),
            *("--output_dir", target / "drawings", "--save_json", target / "new/results.jsonl"),
        )
        rows[script] = [json.loads(line) for line in (target / "new/results.jsonl").read_text().splitlines()]
        assert [row["path"] for row in rows[script]] == expected
        drawings = sorted(str(path.relative_to(target)) for path in target.rglob("*.jpg"))
        assert len(drawings) == 4
        assert [name for name in drawings if name.endswith("/a.png.jpg") and "/x/" not in name] != []
        assert sum(name.endswith("/x/a.png.jpg") or name.endswith("/a.jpg.jpg") for name in drawings) == 2
        anomalies = sum(row["label"] == "Anomaly" for row in rows[script])
        assert f"\n{anomalies} of 4 anomalies\n" in done.stdout
        assert (f"可视化图在{target}/drawings下\n" in done.stdout) == (script == "predict.py")
    for one, other in zip(*rows.values(), strict=True):
        told = {"path", "score", "label", "threshold", "pixel_threshold", "size", "regions"}
        assert one.keys() == other.keys() == told
        assert [region["box"] for region in one["regions"]] == [region["box"] for region in other["regions"]]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_nothing_is_scored_before_all_names_are_good(workplace, tmp_path):
    given = ("--image_path", "images/bottle_good.png", "nowhere.png", "--save_json", tmp_path / "results.jsonl")
    for script, options in (
        ("predict.py", ("-cfg", "configs/resnet18.yaml", *TINY, "--output_dir", tmp_path / "drawings")),
        ("deploy/infer.py", ("--save_inference_dir", "results/inference", "--output_dir", tmp_path / "drawings")),
    ):
        assert "nowhere.png: no such file" in workplace.fail(script, *options, *given)
    assert not list(tmp_path.iterdir())


def test_a_single_picture_goes_where_it_is_asked_to(workplace, tmp_path):
    result = workplace.folder / "results/exp/bottle/result.jpg"
    result.unlink(missing_ok=True)
    lines = predict(workplace, "--image_path", "images/bottle_good.png", "--output_dir", tmp_path / "out").splitlines()
    assert re.fullmatch(r"(Normal|Anomaly) - score:  \d\.\d{3}", lines[1])
    assert lines[2:] == [f"可视化图在{tmp_path}/out下"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bottle_good.png.jpg"]
    assert not result.exists()


def test_a_threshold_above_all_scores_is_warned_of(workplace):
    picture = ("--image_path", "images/bottle_bad.png", "--image_threshold", "1.5", "--pixel_threshold", "0.5")
    for script, options in (
        ("predict.py", ("-cfg", "configs/resnet18.yaml", *TINY, "--exp_dir", "exp")),
        ("deploy/infer.py", ("--save_inference_dir", "results/inference")),
    ):
        done = workplace.succeed(script, *options, *picture)
        assert done.stdout.startswith("Normal - score:  ")
        assert done.stderr == (
            "warning: image threshold 1.5 (--image_threshold): scores end at 1, so no picture is an anomaly\n"
        )


# ---- without -cfg the settings are those of the checkpoint


def test_what_a_checkpoint_was_trained_with_needs_no_config(workplace, tmp_path):
    """All of TINY is in it; with the published config each of these fails."""
    published = ("-cfg", "configs/resnet18.yaml", "--exp_dir", "exp")
    picture = ("--image_path", "images/bottle_good.png")
    wanted = predict(workplace, *picture)
    assert workplace.succeed("predict.py", "--exp_dir", "exp", *picture).stdout == wanted
    assert "trained with input_size 32" in workplace.fail("predict.py", *published, *picture)
    line = workplace.fail("predict.py", "--exp_dir", "exp", *picture, "-o", "clamp=0.5")
    assert "trained with clamp 2.0, the config says 0.5" in line

    evaluated = ("eval.py", "--data", "lite_data", "--exp_dir", "exp", "--is_last")
    own = workplace.succeed(*evaluated).stdout
    assert own == workplace.succeed(*evaluated, *published, *TINY).stdout

    workplace.succeed("deploy/export_model.py", "--exp_dir", "exp", "--save_inference_dir", tmp_path)
    description = yaml.safe_load((tmp_path / "inference.yml").read_text())
    assert description["input_size"] == [32, 32]


def test_the_rule_for_thresholds_is_the_checkpoints_too(workplace):
    content = load_checkpoint(workplace.folder / "results/exp/bottle/best.pdparams")
    workplace.copy_checkpoint(
        "own_rule", held_out=["000.png", "001.png"], config={**content["config"], "threshold_rule": "quantile"}
    )
    options = ("eval.py", "--data", "lite_data", "--exp_dir", "own_rule", "--false_alarm_rate", "0.7")
    assert "(quantile)" in workplace.succeed(*options).stdout
    line = workplace.fail(*options, "-cfg", "configs/resnet18.yaml", *TINY)
    assert "--false_alarm_rate: goes with --threshold_rule quantile, and the rule of bottle is published" in line
    assert "(f1)" in workplace.succeed(*options[:-2], "-o", "threshold_rule=f1").stdout


def test_the_image_score_is_the_checkpoints_too(workplace, tmp_path):
    """One number in the evaluation, the prediction and the export; what was calibrated on another is not used."""
    config = load_checkpoint(workplace.folder / "results/exp/bottle/best.pdparams")["config"]
    workplace.copy_checkpoint("top", config={**config, "image_score": "top", "top_share": 0.1})
    done = workplace.succeed("eval.py", "--data", "lite_data", "--exp_dir", "top", "--threshold_rule", "f1")
    assert done.stderr == ""
    assert (workplace.result("top")["image_score"], workplace.result("top")["top_share"]) == ("top", 0.1)
    calibrated = workplace.thresholds("top")["image_threshold"]
    assert calibrated < workplace.thresholds("exp")["image_threshold"]

    picture = ("--image_path", "images/bottle_bad.png")
    own, by_maximum = (
        workplace.succeed("predict.py", "--exp_dir", "top", *picture, *more) for more in ((), ("-o", "image_score=max"))
    )
    told, decision, _ = own.stdout.splitlines()
    assert f"image {calibrated:.3f} (f1)" in told
    assert by_maximum.stdout.splitlines()[0] == predict(workplace, *picture, "--image_threshold", "0.8").splitlines()[1]
    assert by_maximum.stderr.count("\n") == 1
    assert "of image_score top 0.1, not max, and are not used" in by_maximum.stderr

    done = workplace.succeed("deploy/export_model.py", "--exp_dir", "top", "--save_inference_dir", tmp_path)
    assert f"image {calibrated:.3f} (f1)" in done.stdout
    done = workplace.succeed("deploy/infer.py", "--save_inference_dir", tmp_path, *picture)
    assert done.stdout.splitlines()[1] == decision


def test_a_published_checkpoint_which_holds_no_settings_has_the_published_ones(workplace):
    content = load_checkpoint(workplace.folder / "results/exp/bottle/best.pdparams")
    path = workplace.folder / "results/published/bottle/best.pdparams"
    save_checkpoint(path, {key: content[key] for key in ("epoch", "model_state_dict")})
    options = ("predict.py", "--exp_dir", "published", "--image_path", "images/bottle_good.png")
    decision = predict(workplace, *options[-2:], "--image_threshold", "0.8", "--pixel_threshold", "0.8").splitlines()[0]
    assert workplace.succeed(*options, *TINY).stdout.splitlines()[0] == decision
    assert "best.pdparams" in workplace.fail(*options)  # of four steps


def test_the_name_of_a_picture_forges_no_line_of_predict(workplace, tmp_path):
    for name in ("a\nb.png  Normal - score:  0.001", "c"):
        shutil.copy(ROOT / "images/bottle_good.png", tmp_path / f"{name}.png")
    first, second = predict(workplace, "--image_path", tmp_path).splitlines()[1:-2]
    assert (first.partition("  ")[0], second.partition("  ")[0]) == (f"{tmp_path}/a\\nb.png", f"{tmp_path}/c.png")


def test_infer_batches_give_the_same_scores(workplace):
    options = ("--save_inference_dir=results/inference", "--image_path=lite_data/bottle/test/good")
    single = workplace.succeed("deploy/infer.py", *options, "--batch_size=1").stdout
    batched = workplace.succeed("deploy/infer.py", *options, "--batch_size=3", "--benchmark=True", "--warmup=1").stdout
    assert len(single.splitlines()) == 10  # the thresholds come first, the sum last
    assert batched.startswith(single)
    for word in ("preprocess", "inference", "postprocess", "batch_size: 3", "precision", "device: cpu", "memory"):
        assert word in batched


def test_infer_limits_the_batch(workplace):
    options = ("--save_inference_dir=results/inference", "--image_path=lite_data/bottle/test/good")
    done = workplace.succeed("deploy/infer.py", *options, "--batch_size=32", "--max_batch_size=3", "--benchmark=True")
    assert "batch_size: 3" in done.stdout
    assert "--batch_size 32" in done.stderr


def test_a_damaged_picture_does_not_stop_the_rest(workplace, tmp_path):
    for name in ("000", "001", "002"):
        shutil.copy(ROOT / f"lite_data/bottle/test/good/{name}.png", tmp_path)
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:5000])
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "--category", "bottle", "--exp_dir", "exp")
    for script, options in (
        ("predict.py", common),
        ("deploy/infer.py", ("--save_inference_dir", "results/inference", "--batch_size", "2")),
    ):
        done = workplace.run(script, *options, "--image_path", tmp_path)
        assert done.returncode != 0
        assert done.stdout.count("score:") == 2
        assert re.search(r"^\d of 2 anomalies, 1 could not be read$", done.stdout, re.MULTILINE)
        assert len(done.stderr.strip().splitlines()) == 1
        assert "001.png" in done.stderr


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py", "train_all.py", "deploy/export_model.py"])
def test_where_there_is_no_paddle_one_line_says_so(tmp_path, script):
    (tmp_path / "paddle.py").write_text("raise ModuleNotFoundError('no paddle', name='paddle')")
    options = {"predict.py": ["-cat", "bottle", "--image_path", "images"], "train_all.py": []}
    command = [sys.executable, ROOT / script, *options.get(script, ["-cat", "bottle"])]
    if script in ("train.py", "eval.py", "train_all.py"):
        command += ["--data", "lite_data"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: Python has no module paddle here; pip install -r requirements"
    )
    assert "PyPI has it for Linux and Windows on x86-64 and for macOS on ARM" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_runs_where_there_is_nothing_of_linux(empty):
    """Simulated: tests/other_systems.py hides what Windows lacks."""
    common = ["-cfg", "configs/resnet18.yaml", "--data", "lite_data", *TINY, "--exp_dir", "exp", "-cat", "bottle"]
    for script, options in (("train.py", ["--epochs", "1", "--cache_memory", "0"]), ("eval.py", [])):
        command = [sys.executable, ROOT / "tests/other_systems.py", ROOT / script, *common, *options]
        done = subprocess.run(command, cwd=empty.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert not list((empty.folder / "results").rglob(".*"))
    command = [sys.executable, ROOT / "tests/other_systems.py", ROOT / "train_all.py"]
    done = subprocess.run(command, cwd=empty.folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "train_all.py: needs Linux or macOS" in done.stderr


def test_infer_needs_only_deploy_and_the_export(workplace, tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    command = [sys.executable, "deploy/infer.py", "--save_inference_dir", workplace.folder / "results/inference"]
    command += ["--image_path", ROOT / "images/bottle_good.png", "--output_dir", "drawings"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "drawings/bottle_good.png.jpg").exists()


def test_help_of_infer_does_not_import_paddle(workplace):
    code = (
        "import runpy, sys\nsys.argv = ['infer.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'deploy/infer.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\nassert 'paddle' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_export_that_does_not_fit_its_description_is_refused(workplace, tmp_path):
    shutil.copytree(workplace.folder / "results/inference", tmp_path / "model")
    with open(tmp_path / "model/inference.pdiparams", "ab") as file:
        file.write(b"x")
    options = ("--save_inference_dir", tmp_path / "model", "--image_path", "images/bottle_good.png")
    assert "inference.pdiparams" in workplace.fail("deploy/infer.py", *options)


# ---- own data


def test_own_category_without_masks(empty, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "lite_data/bottle/train", data / "my part/train")
    shutil.copytree(ROOT / "lite_data/bottle/test", data / "my part/test")
    options = ("-cfg", "configs/resnet18.yaml", "--data", data, *TINY, "--exp_dir", "exp", "-cat", "my part")
    empty.succeed("train.py", *options, "--epochs", "1")
    done = empty.succeed("eval.py", *options, "--threshold_rule", "f1")
    assert re.search(r"my part          pixel auroc:n/a   image auroc:\d\.\d{3}\n", done.stdout)
    result = empty.result("exp", "my part")
    assert result["pixel_auroc"] is result["pixel_f1_threshold"] is result["aupro"] is None
    thresholds = empty.thresholds("exp", "my part")
    assert thresholds["image_threshold"] < result["image_f1_threshold"]
    assert (thresholds["pixel_threshold"], thresholds["pixel_rule"]) == (0.8, "published")


@pytest.fixture(scope="module")
def wide_pictures(tmp_path_factory) -> Path:
    """JPEG and BMP pictures, 120 pixels high and 200 wide, with defects near the upper right corner."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "panel"
    rows, columns = np.mgrid[:120, :200]

    def draw(name: str, defect: bool) -> None:
        picture = 120 + 40 * np.sin(columns / 9 + random.uniform(0, 6)) + 20 * np.cos(rows / 7)
        picture = picture[..., None] * [1.0, 0.8, 0.6] + random.normal(0, 4, (120, 200, 3))
        row, column = random.integers(30, 36), random.integers(155, 165)
        spot = (rows - row) ** 2 + (columns - column) ** 2 <= 12**2
        if defect:
            picture[spot] += [-40, 0, 60]
            mask = folder / "ground_truth" / Path(name).parent.name / f"{Path(name).stem}_mask.bmp"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(255 * spot)).save(mask)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(picture.clip(0, 255))).save(folder / name)

    for i in range(16):
        draw(f"train/good/{i:02}.{'jpg' if i % 2 else 'BMP'}", defect=False)
    for i in range(4):
        draw(f"test/good/{i}.bmp", defect=False)
        draw(f"test/spot/{i}.{'jpeg' if i % 2 else 'bmp'}", defect=True)
    return folder.parent


def test_pictures_that_are_neither_square_nor_png(empty, wide_pictures):
    """From the training to the exported model; a height taken for a width would move the defect or fail."""
    model = ["-cfg", "configs/resnet18.yaml", "-o", "input_size=[64, 96]", "-o", "flow_step=1"]
    model += ["-o", "pretrained=offline", "--exp_dir", "exp", "-cat", "panel"]
    empty.succeed("train.py", *model, "--data", wide_pictures, "--epochs", 6, "--batch_size", 8, "--test_epochs", 6)
    empty.succeed("eval.py", *model, "--data", wide_pictures, "--threshold_rule", "f1")
    panel = json.loads((empty.folder / "results/exp/eval.json").read_text())["categories"]["panel"]
    assert (panel["images"], panel["images_with_mask"]) == (8, 4)
    assert panel["pixel_auroc"] > 0.9

    picture = wide_pictures / "panel/test/spot/0.bmp"
    said, predicted, _ = empty.succeed("predict.py", *model, "--image_path", picture).stdout.splitlines()
    assert said.startswith("thresholds: ")
    with Image.open(empty.folder / "results/exp/panel/result.jpg") as drawing:
        assert drawing.size == (3 * (427 + 12), 256 + 3 * 24)  # panels of 200 x 120, gaps between, and lines of text

    empty.succeed("deploy/export_model.py", *model)
    folder = empty.folder / "results/inference"
    description = yaml.safe_load((folder / "inference.yml").read_text())
    assert description["input_size"] == [64, 96]
    inferred = empty.succeed("deploy/infer.py", "--image_path", picture).stdout
    assert inferred.splitlines()[1:] == [predicted]
    batch = preprocess(read_rgb(picture), 64, 96)
    raw, smoothed, score = load_exported(folder).run(batch)
    assert raw.shape == smoothed.shape == (1, 1, 64, 96)
    assert decision_line(score.item(), description["image_threshold"]) == predicted
    quarters = smoothed.reshape(2, 32, 2, 48).mean(axis=(1, 3))
    assert quarters.argmax() == 1  # the upper right one, where the spots are


# ---- bad input: one line, a non-zero code, and what was there before stays


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["-cat", "nut"], "nut"),
        (["-cat", "bottle", "--data", "nowhere"], "nowhere"),
        (["-cat", "bottle", "-cfg", "no.yaml"], "no.yaml"),
        (["-cat", "bottle", "-o", "learning_rate=1"], "learning_rate"),
        (["-cat", "bottle", "-o", "lr=fast"], "lr"),
        (["-cat", "bottle", "-o", "epochs"], "epochs"),
        (["-cat", "bottle", "--epochs", "0"], "--epochs"),
        (["-cat", "bottle", "--device", "tpu"], "tpu"),
        (["-cat", "bottle", "--device", "gpu:99"], "gpu:99"),
        (["-cat", "bottle", "--backbone_weights", "no.npz"], "no.npz"),
        (["-cat", "bottle", "--exp_dir", "images/bottle_good.png"], "bottle_good.png"),
        (["-cat", "bottle", "--no_such_option"], "--no_such_option"),
        (["-cat", "bottle", "--test_epochs", "0"], "--test_epochs"),
        (["-cat", "bottle", "--cuda", "perhaps"], "--cuda"),
    ],
)
def test_bad_options_of_train(empty, options, word):
    if "images/bottle_good.png" in options:  # a file where the folder should be
        (empty.folder / "results/images").mkdir(parents=True)
        shutil.copy(ROOT / "images/bottle_good.png", empty.folder / "results/images")
    common = ["-cfg", "configs/resnet18.yaml", "--data", "lite_data", *TINY]
    assert word in empty.fail("train.py", *common, *options)
    assert not list(empty.folder.glob("results/**/*.pdparams"))


@pytest.mark.parametrize(
    ("name", "line"),
    [("vgg", "resnet18, resnet34"), ("resnet50", "channels must be [256, 512, 1024] with resnet50")],
)
def test_a_backbone_that_does_not_fit_is_noticed_before_anything_is_written(empty, name, line):
    options = ("-cfg", "configs/resnet18.yaml", "--data", "lite_data", "-cat", "bottle", *TINY)
    assert line in empty.fail("train.py", *options, "-o", f"backbone_name={name}")
    assert not (empty.folder / "results").exists()


@pytest.mark.parametrize("damage", ["corrupt picture", "missing mask", "no test pictures"])
def test_bad_data_damages_no_earlier_result(workplace, tmp_path, damage):
    shutil.copytree(ROOT / "lite_data/bottle", tmp_path / "data/bottle")
    bottle = tmp_path / "data/bottle"
    if damage == "corrupt picture":
        victim = bottle / "test/good/003.png"
        victim.write_bytes(victim.read_bytes()[:3000])
    elif damage == "missing mask":
        victim = bottle / "ground_truth/broken_large/002_mask.png"
        victim.unlink()
    else:
        victim = bottle / "test"
        shutil.rmtree(victim)
        victim.mkdir()
    folder = workplace.folder / "results/exp/bottle"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    options = (
        "-cfg",
        "configs/resnet18.yaml",
        *TINY,
        "--data",
        tmp_path / "data",
        "-cat",
        "bottle",
        "--exp_dir",
        "exp",
    )
    line = workplace.fail("train.py", *options, "--backbone_weights", npz(tmp_path))
    assert victim.name in line
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not list(folder.parent.glob("bottle.*")), "nothing is moved by a training that cannot start"


def npz(folder: Path) -> Path:
    """Some backbone weights, so that no warning of the offline start mixes with the error."""
    from models.backbone import build_backbone

    state = {name: value.numpy() for name, value in build_backbone("resnet18").state_dict().items()}
    np.savez(folder / "weights.npz", **state)
    return folder / "weights.npz"


def test_checkpoint_of_another_architecture(workplace):
    options = ("-cfg", "configs/resnet18.yaml", *TINY, "-o", "flow_step=2", "--exp_dir", "exp")
    for script, more in (
        ("eval.py", ("--data", "lite_data", "-cat", "bottle")),
        ("predict.py", ("-cat", "bottle", "--image_path", "images/bottle_good.png")),
        ("deploy/export_model.py", ("-cat", "bottle")),
    ):
        line = workplace.fail(script, *options, *more)
        assert "best.pdparams" in line
        assert "nf_flows.0.module_list.1" in line


def test_no_such_checkpoint_or_picture(workplace):
    common = ("-cfg", "configs/resnet18.yaml", *TINY, "-cat", "bottle")
    assert "nothing/bottle" in workplace.fail(
        "predict.py", *common, "--exp_dir", "nothing", "--image_path", "images/bottle_good.png"
    )
    assert "no.png" in workplace.fail("predict.py", *common, "--exp_dir", "exp", "--image_path", "no.png")
    assert "inference.yml" in workplace.fail(
        "deploy/infer.py", "--save_inference_dir", "images", "--image_path", "images/bottle_good.png"
    )


# ---- configs/auto.yaml


AUTO = ("-cfg", "configs/auto.yaml")


def test_a_training_of_auto_stores_the_average_the_held_out_pictures_and_the_last_epoch(workplace):
    workplace.train("stable", *AUTO, "--epochs", 3, "--test_epochs", 1)
    folder = workplace.folder / "results/stable/bottle"
    best, last = (load_checkpoint(folder / name) for name in ("best.pdparams", "last.pdparams"))
    assert best["epoch"] == last["epoch"] == 3
    assert last["config"]["selection"] == "last"
    names = {path.name for path in (ROOT / "lite_data/bottle/train/good").iterdir()}
    assert len(last["held_out"]) == round(0.1 * len(names))
    assert set(last["held_out"]) < names
    stored, own = last["model_state_dict"], last["average"]["parameters"]
    assert any((stored[name] != own[name]).any() for name in own)
    rows = workplace.history("stable")
    assert all(row["val_loss"] for row in rows)
    assert float(rows[-1]["lr"]) < float(rows[0]["lr"])


def test_a_training_of_auto_resumes_to_the_same_losses(workplace):
    options = (*AUTO, "--test_epochs", 1, "-o", "lr_schedule=constant")
    workplace.train("stable_whole", *options, "--epochs", 2)
    workplace.train("stable_stopped", *options, "--epochs", 1)
    workplace.train("stable_stopped", *options, "--epochs", 2, "--resume")
    whole, resumed = workplace.history("stable_whole"), workplace.history("stable_stopped")
    for key in ("epoch", "loss", "val_loss", "image_auroc", "pixel_auroc"):
        assert [row[key] for row in resumed] == [row[key] for row in whole], key


def test_a_budget_in_steps_ends_within_an_epoch_and_resumes_to_the_same_losses(workplace):
    options = (*AUTO, "-o", "lr_schedule=constant", "-o", "eval_interval=1")
    whole = workplace.train("steps_whole", *options, "-o", "steps=7").stdout
    assert "7 steps: the training pictures are gone through in 3 epochs" in whole
    assert "trains all 3 epochs" in whole
    assert [line for line in whole.splitlines() if "iter:1/" in line][-1].split(" - ")[:2] == [
        "bottle  Epoch 3",
        "iter:1/1",
    ]
    assert whole.count("EVAL:") == 3
    workplace.train("steps_stopped", *options, "-o", "steps=3")
    resumed = workplace.train("steps_stopped", *options, "-o", "steps=7", "--resume").stdout
    assert "Epoch 2 - iter:1/3" in resumed
    rows, others = workplace.history("steps_whole"), workplace.history("steps_stopped")
    assert [row["steps"] for row in rows] == ["3", "6", "7"]
    for key in ("epoch", "steps", "loss", "val_loss", "image_auroc", "pixel_auroc"):
        assert [row[key] for row in rows] == [row[key] for row in others], key
    again = workplace.train("steps_stopped", *options, "-o", "steps=7", "--resume").stdout
    assert "Epoch" not in again
    assert workplace.history("steps_stopped") == others


def test_steps_that_nobody_counted_are_not_gone_on_from(workplace):
    path = workplace.copy_checkpoint("uncounted")
    checkpoint = load_checkpoint(path)
    rows = [{key: value for key, value in row.items() if key != "steps"} for row in checkpoint["history"]]
    save_checkpoint(path.with_name("last.pdparams"), {**checkpoint, "history": rows})
    common = ("--data", "./lite_data", "-cat", "bottle", *TINY, "--exp_dir", "uncounted", "--resume")
    line = workplace.fail("train.py", *common, "-o", "steps=100")
    assert line.endswith("its steps were not counted; --resume goes on only with -o steps=null")


def test_val_likelihood_keeps_the_epoch_with_the_lowest_held_out_loss(workplace):
    options = ("-o", "selection=val_likelihood", "--test_epochs", 1, "--epochs", 3, "-o", "lr=0.02")
    workplace.train("likely", *AUTO, *options)
    rows = workplace.history("likely")
    lowest = min(rows, key=lambda row: float(row["val_loss"]))
    best = load_checkpoint(workplace.folder / "results/likely/bottle/best.pdparams")
    assert best["epoch"] == int(lowest["epoch"])


def test_resume_refuses_what_a_training_cannot_change_half_way(workplace):
    workplace.train("fixed", *AUTO, "--epochs", 1)
    options = ("--data", "lite_data", "-cat", "bottle", *TINY, "--exp_dir", "fixed", "--resume", "--epochs", 2)
    for change, text in (("ema_decay=0", "ema_decay 0.9"), ("holdout=0.2", "holdout 0.1"), ("seed=1", "held out")):
        line = workplace.fail("train.py", *AUTO, *options, "-o", change)
        assert "last.pdparams" in line
        assert text in line


def test_good_pictures_alone_are_enough_for_auto(workplace):
    data = workplace.folder / "only_good"
    (data / "part/train").mkdir(parents=True)
    (data / "part/train/good").symlink_to(ROOT / "lite_data/bottle/train/good")
    common = ("--data", data, "-cat", "part", *TINY, "--epochs", 1)
    done = workplace.succeed("train.py", *AUTO, *common, "--exp_dir", "good")
    assert "EVAL" not in done.stdout and "auroc: " not in done.stdout
    assert done.stdout.splitlines()[-2] == "part             pixel auroc:n/a    image auroc:n/a"
    assert "held-out loss" in done.stdout
    line = workplace.fail("train.py", "-cfg", "configs/resnet18.yaml", *common, "--exp_dir", "no_test_set")
    assert "auto.yaml" in line
    assert not (workplace.folder / "results/no_test_set").exists()


@pytest.mark.parametrize(("at_once", "said"), [(False, "line\nclean-up\n"), (True, "line\n")])
def test_a_script_may_end_without_clean_up_but_not_without_its_output(at_once, said):
    code = f"""
import atexit
from deploy.common.cli import run_main
atexit.register(print, "clean-up")
run_main(lambda: print("line") or 2, end_at_once={at_once})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, said, "")
