"""python -m benchmarks.accuracy, with train.py and eval.py replaced: which runs it makes, keeps and joins."""

import json

import pytest

from benchmarks import accuracy
from benchmarks.inputs import ROOT
from deploy.common.cli import UserError

OPTIONS = ["input_size=64"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were run; each leaves the files that it would leave."""
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run = []

    def command(*words):
        run.append(words)
        folder = tmp_path / "results" / words[words.index("--exp_dir") + 1]
        category = words[words.index("-cat") + 1]
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / category / "history.csv").write_text("epoch,loss,image_auroc\n1,2.5,\n2,1.5,0.75\n")
        row = {"image_auroc": 0.75, "backbone": {"file": "/home/somebody/weights.npz"}}
        row["regions"] = {"true": 1, "pictures": {"/home/somebody/0.png": {"true": 1}}}
        (folder / "eval.json").write_text(json.dumps({"categories": {category: row}}))

    monkeypatch.setattr(accuracy, "command", command)
    return run


@pytest.fixture
def data(tmp_path):
    """Two folders of categories with 40 good pictures each, of which nothing is read."""
    for name in ("one/part", "one/other", "two/third"):
        folder = tmp_path / name / "train/good"
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"{i}.png").touch()
    return [tmp_path / "one", tmp_path / "two"]


def measure(monkeypatch, output, data, *options):
    words = ["accuracy", "--data", *map(str, data), "--output", str(output), "-o", *OPTIONS, *options]
    monkeypatch.setattr("sys.argv", words)
    accuracy.main()
    return json.loads((output / "accuracy.json").read_text())["runs"]


def options_of(words):
    return {words[i + 1] for i, word in enumerate(words) if word == "-o"}


def test_every_category_of_every_folder_is_trained_with_every_config_and_seed(monkeypatch, tmp_path, commands, data):
    runs = measure(monkeypatch, tmp_path / "new/folder", data)
    assert [(run["category"], run["config"], run["seed"]) for run in runs] == [
        (category, config, seed)
        for category in ("other", "part", "third")
        for config in ("auto", "resnet18")
        for seed in (0, 1, 2)
    ]
    assert [words[0] for words in commands] == ["train.py", "eval.py"] * 18
    assert {"--is_last" in words for words in commands[1::2]} == {True}
    assert {words[words.index("--data") + 1] for words in commands} == {str(folder) for folder in data}


def test_a_run_has_its_whole_budget_and_is_evaluated_on_the_way(monkeypatch, tmp_path, commands, data):
    short = ("--categories", "part", "--seeds", "1")
    auto, published = measure(monkeypatch, tmp_path, data, *short, "--epochs", "32")
    assert (auto["epochs"], auto["pictures"], auto["options"]) == (None, 36, OPTIONS)
    assert (published["steps"], published["epochs"], published["pictures"]) == (None, 32, 40)
    epochs = -(-auto["steps"] // 5)  # of five batches of eight
    rules = {"seed=1", "selection=last", *OPTIONS}
    assert options_of(commands[0]) == {f"steps={auto['steps']}", f"eval_interval={epochs // 8}", *rules}
    assert options_of(commands[2]) == {"epochs=32", "eval_interval=4", *rules}
    assert auto["history"] == [
        {"epoch": 1, "loss": 2.5, "image_auroc": None},
        {"epoch": 2, "loss": 1.5, "image_auroc": 0.75},
    ]
    assert auto["last"]["backbone"]["file"] == "weights.npz"
    assert auto["last"]["regions"] == {"true": 1}
    assert "somebody" not in json.dumps(auto)


def test_each_run_is_measured_once_and_others_join(monkeypatch, tmp_path, commands, data):
    short = ("--categories", "third", "--configs", "resnet18", "--epochs", "2")
    (first,) = measure(monkeypatch, tmp_path, data, *short, "--seeds", "1")
    runs = measure(monkeypatch, tmp_path, data, *short, "--seeds", "0", "1")
    assert ([run["seed"] for run in runs], runs[1]) == ([0, 1], first)
    assert len(commands) == 4
    runs = measure(monkeypatch, tmp_path, data, *short, "--seeds", "1", "--epochs", "3")
    assert [(run["seed"], run["epochs"]) for run in runs] == [(0, 2), (1, 2), (1, 3)]
    measure(monkeypatch, tmp_path, data, *short, "--seeds", "1", "-o", "flow_step=1")
    assert len({words[words.index("--exp_dir") + 1] for words in commands}) == 4


def test_categories_that_are_not_there_or_twice_are_named(monkeypatch, tmp_path, data):
    with pytest.raises(UserError, match="not under --data: bottle; there are: other, part, third"):
        accuracy.find_categories(data, ["bottle"])
    (tmp_path / "two/part").symlink_to(tmp_path / "one/part")
    with pytest.raises(UserError, match="both have a category part"):
        accuracy.find_categories(data, None)
    assert accuracy.find_categories(data, ["third"]) == {"third": data[1]}
