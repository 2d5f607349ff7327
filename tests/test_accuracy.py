"""python -m benchmarks.accuracy, with train.py and eval.py replaced: which runs it makes, keeps and joins."""

import json

import pytest

from benchmarks import accuracy
from deploy.common.cli import UserError

OPTIONS = ["input_size=64"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were run; each leaves the files that it would leave."""
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    run = []

    def command(*words):
        run.append(words)
        folder = tmp_path / "results" / words[words.index("--exp_dir") + 1]
        (folder / "bottle").mkdir(parents=True, exist_ok=True)
        (folder / "bottle/history.csv").write_text("epoch,loss,image_auroc,pixel_auroc\n1,2.5,,\n2,1.5,0.75,0.5\n")
        row = {"image_auroc": 0.75, "backbone": {"file": "/home/somebody/weights.npz"}}
        (folder / "eval.json").write_text(json.dumps({"categories": {"bottle": row}}))

    monkeypatch.setattr(accuracy, "command", command)
    return run


def measure(monkeypatch, output, *options):
    monkeypatch.setattr("sys.argv", ["accuracy", "--data", "data", "--output", str(output), "-o", *OPTIONS, *options])
    accuracy.main()
    results = json.loads((output / "accuracy.json").read_text())
    assert (results["category"], results["options"]) == ("bottle", OPTIONS)
    return results["runs"]


def test_each_run_is_trained_and_evaluated_once_and_others_join(monkeypatch, tmp_path, commands):
    output = tmp_path / "new/folder"
    short = ("--configs", "resnet18", "--epochs", "2")
    (first,) = measure(monkeypatch, output, *short, "--seeds", "1")
    assert (first["config"], first["seed"], first["epochs"]) == ("resnet18", 1, 2)
    assert first["history"] == [
        {"epoch": 1, "loss": 2.5, "image_auroc": None, "pixel_auroc": None},
        {"epoch": 2, "loss": 1.5, "image_auroc": 0.75, "pixel_auroc": 0.5},
    ]
    assert first["chosen"]["backbone"]["file"] == "weights.npz"
    assert [words[0] for words in commands] == ["train.py", "eval.py", "eval.py"]
    assert {"seed=1", "patience=2", "input_size=64"} <= set(commands[0])
    assert "--is_last" in commands[2]

    runs = measure(monkeypatch, output, *short, "--seeds", "0", "1")
    assert ([run["seed"] for run in runs], runs[1]) == ([0, 1], first)
    assert len(commands) == 6
    runs = measure(monkeypatch, output, "--configs", "resnet18", "--epochs", "3", "--seeds", "1")
    assert [(run["seed"], run["epochs"]) for run in runs] == [(0, 2), (1, 2), (1, 3)]
    assert len({words[words.index("--exp_dir") + 1] for words in commands}) == 3
    assert (output / "accuracy.png").stat().st_size > 0


def test_runs_of_another_category_or_with_other_options_are_not_mixed(monkeypatch, tmp_path, commands):
    measure(monkeypatch, tmp_path, "--configs", "resnet18", "--seeds", "0")
    with pytest.raises(UserError, match="holds runs of category bottle; give another --output for cable"):
        measure(monkeypatch, tmp_path, "--category", "cable")
    with pytest.raises(UserError, match=r"holds runs of options .*; give another --output for .*flow_step=1"):
        measure(monkeypatch, tmp_path, "-o", "flow_step=1")
