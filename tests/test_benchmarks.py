"""The benchmark compares like with like, and reports what it measured."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from benchmarks import measure as measure_module
from benchmarks import processes
from benchmarks.__main__ import (
    RUNTIMES,
    describe_machine,
    find_anomalib,
    find_runtimes,
    inference_contenders,
    make_contenders,
)
from benchmarks.inputs import random_images, random_maps, spread, write_bottle
from benchmarks.measure import QUICK, export, inference, interleaved, paper, same_losses
from benchmarks.plots import draw_curves
from benchmarks.processes import Contender, OtherProcesses, Worker, run_command
from benchmarks.published import ListEvaluation, PublishedFastFlow
from benchmarks.report import (
    ANOMALIB,
    OURS,
    PUBLISHED,
    TUNED,
    Figure,
    check_goals,
    markdown,
    number,
    quartiles,
    summary,
)
from benchmarks.start import published_config, same_model
from benchmarks.timing import peak_memory, repeat, repeat_steps
from datasets.mvtec import load_category, load_ground_truth
from deploy.common.cli import UserError
from models.fastflow import negative_log_likelihood
from tests.converter import needs_converter
from utils.checkpoint import published_state
from utils.evaluation import Scores, measure


@pytest.fixture(scope="module")
def pair():
    """Ours and the published graph, for pictures of 64 pixels, with the same parameters, none of them at its start."""
    config = published_config(64)
    ours = same_model(config)
    random = np.random.RandomState(0)
    for name, parameter in ours.named_parameters():
        if name.endswith(("global_scale", "global_offset")):
            parameter.set_value(parameter + paddle.to_tensor(0.1 * random.randn(*parameter.shape).astype(np.float32)))
    published = PublishedFastFlow(config)
    published.set_published_state(published_state(ours))
    return ours, published


def test_the_published_graph_has_our_loss_and_gradients(pair):
    ours, published = pair
    images = paddle.to_tensor(random_images(3, 64))
    ours.train()
    published.train()
    loss = negative_log_likelihood(ours.latents(ours.feature_extractor(images)))
    loss.backward()
    plain_loss = published(images)
    plain_loss.backward()
    assert plain_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad.numpy() for name, p in ours.named_parameters() if p.grad is not None}
    plain = {name: p.grad.numpy() for name, p in published.named_parameters() if p.grad is not None}
    assert gradients.keys() == plain.keys()
    largest = max(np.abs(value).max() for value in plain.values())
    for name, value in plain.items():
        np.testing.assert_allclose(gradients[name], value, rtol=2e-3, atol=1e-5 * largest, err_msg=name)
    for model in pair:
        model.clear_gradients()


def test_the_published_graph_has_our_maps(pair):
    ours, published = pair
    images = paddle.to_tensor(random_images(2, 64))
    ours.eval()
    published.eval()
    with paddle.no_grad():
        anomaly_map, _, _ = ours(images)
        np.testing.assert_allclose(published(images).numpy(), anomaly_map.numpy(), rtol=1e-4, atol=1e-6)


def test_the_published_evaluation_gives_our_aurocs():
    maps, truth = random_maps(9)
    model = same_model(published_config())
    smoothed = model.smooth(paddle.to_tensor(maps[:, None]))[:, 0]
    lists = ListEvaluation()
    for anomaly_map, mask in zip(maps, truth.masks, strict=True):
        lists.add(anomaly_map, mask)
    ours = measure(Scores(maps.max(axis=(1, 2)), smoothed.numpy()), truth)
    assert lists.measure() == pytest.approx(ours, abs=1e-6)
    assert 0.5 < lists.measure()[1] < 1


def test_a_drawn_bottle_has_bottles_layout(tmp_path):
    write_bottle(tmp_path / "bottle", 5, 8)
    category = load_category(tmp_path, "bottle")
    assert (len(category.train), len(category.test)) == (5, 8)
    truth = load_ground_truth(category.test, (256, 256), "published")
    assert truth.labels.sum() == 6
    assert spread([0, 1, 2, 3, 4], 3) == [0, 2, 4]


@pytest.mark.slow
def test_a_worker_answers_and_reports_what_fails(monkeypatch):
    monkeypatch.setattr(processes, "DISTURBED", 1)  # other tests run beside it
    worker = Worker(make_contenders(1, 1)[OURS])
    try:
        assert worker.description["runtime"]["OMP_NUM_THREADS"] == "1"
        steps = worker.ask("step", size=64, batch=2, backbone=True, seconds=0)
        assert steps["passes"][0] < steps["whole"][0]
        assert len(worker.ask("forward", size=64, batch=1, seconds=0)) == 1
        with pytest.raises(UserError, match="AttributeError"):
            worker.ask("nonsense")
    finally:
        worker.stop()


@pytest.mark.slow
@needs_converter("openvino")
def test_exported_models_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "DISTURBED", 1)  # other tests run beside it
    worker = Worker(make_contenders(1, 1)[OURS])
    try:
        exported = export(worker, tmp_path)
    finally:
        worker.stop()
    runtimes, missing = find_runtimes()
    assert "OpenVINO fp32" in runtimes
    assert missing or runtimes == RUNTIMES
    contenders = inference_contenders(exported, runtimes, 1, "python")
    assert {name for name, _ in contenders} == set(runtimes)
    assert ("OpenVINO fp32", ANOMALIB) in contenders
    one = {("OpenVINO fp32", OURS): contenders["OpenVINO fp32", OURS]}
    figures = {figure.key: figure for figure in inference(one, replace(QUICK, rounds=1, turn=0.0))}
    single, batch, rate = (
        figures[f"inference/OpenVINO fp32/{kind}"].median(OURS) for kind in ("1", "8", "throughput/8")
    )
    assert 0 < single < batch
    assert rate == pytest.approx(8 / batch)


@pytest.mark.slow
@needs_converter("openvino")
def test_the_papers_rows_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "DISTURBED", 1)  # other tests run beside it
    monkeypatch.setattr(measure_module, "PAPER", ("resnet18",))
    runtimes = {"OpenVINO fp32": RUNTIMES["OpenVINO fp32"]}

    def contenders(folder):
        return inference_contenders(folder, runtimes, 1, None)

    figures = {figure.key: figure.median(OURS) for figure in paper(contenders, replace(QUICK, turn=0.0), tmp_path)}
    assert list(figures) == [f"paper/resnet18/{what}" for what in ("step", "memory", "OpenVINO fp32")]
    assert 0 < figures["paper/resnet18/OpenVINO fp32"] < figures["paper/resnet18/step"]
    assert 0.1e9 < figures["paper/resnet18/memory"] < 3e9
    assert not list(tmp_path.iterdir())


def test_a_worker_that_cannot_start_is_a_user_error():
    with pytest.raises(UserError, match="benchmark of broken"):
        Worker(Contender("broken", "without torch, or without a number", ("anomalib", "no number")))


def test_first_losses_are_compared_on_a_busy_machine(monkeypatch):
    """A repeated training step would give the loss after an update."""
    asked = []

    class Fake(Worker):
        def __init__(self, loss):
            self._loss = loss
            self._process = SimpleNamespace(pid=os.getpid(), stdin=io.StringIO())

        def _answer(self):
            asked.append(self._loss)
            return {"loss": self._loss / asked.count(self._loss)}

    monkeypatch.setattr(OtherProcesses, "share", lambda self: 1.0)
    workers = {OURS: Fake(2.0), PUBLISHED: Fake(2.001), TUNED: Fake(2.0015)}
    assert same_losses(workers) == pytest.approx(0.00075)
    assert asked == [2.0, 2.001, 2.0015]
    workers[OURS].ask("step")
    assert asked.count(2.0) > 2, "timed calls are repeated"


def test_contenders_take_turns():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self):
            asked.append(self.name)
            return self.name

    workers = {name: Fake(name) for name in "abc"}
    answers = interleaved(workers, lambda name: 1 if name == "b" else 2, lambda worker: worker.ask())
    assert asked == ["a", "b", "c", "a", "c"]
    assert answers == {"a": ["a", "a"], "b": ["b"], "c": ["c", "c"]}


def test_clocks():
    assert len(repeat(lambda: None, 0)) == 1
    samples = repeat_steps(lambda: None, lambda: None, 0)
    assert len(samples["passes"]) == len(samples["whole"]) == 1
    assert 1e7 < peak_memory() < 1e12


def test_what_other_processes_take(tmp_path):
    everything, all_but_one = OtherProcesses(), OtherProcesses(1)
    run_command([sys.executable, "-c", "sum(range(20_000_000))"], tmp_path)
    assert 0 <= everything.share() < all_but_one.share() <= 1


def test_the_time_to_a_model_is_that_of_all_its_commands(tmp_path, monkeypatch):
    run = []

    def finished(command, folder, changes):
        run.append((command[1].removeprefix(f"{processes.ROOT}/"), changes))
        return processes.Finished(10.0 * len(run), 0)

    monkeypatch.setattr(measure_module, "run_command", finished)
    monkeypatch.setattr(measure_module, "MODEL_PICTURES", 3)
    own, same_steps = measure_module.time_to_model(processes.ROOT / "lite_data", "bottle", tmp_path, None)
    alone = {"FASTFLOW_BACKBONE_WEIGHTS": ""}  # it is of ResNet18
    assert run == [("train.py", alone), ("eval.py", alone), ("deploy/export_model.py", alone)]
    assert own.samples == same_steps.samples == {OURS: [60.0]}
    category = load_category(tmp_path / "model/data", "bottle")
    assert (len(category.train), len(category.test)) == (3, 26)
    assert {goal["value"] for goal in check_goals([own])} == {60.0}


def test_a_command_that_fails_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="exit code 3"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    assert run_command([sys.executable, "-c", "pass"], tmp_path).peak > 1e6


def test_without_anomalib_a_line_says_so(tmp_path):
    python, line = find_anomalib(tmp_path / "python")
    assert python is None
    assert "anomalib is not installed" in line


def step(ours, published, tuned, anomalib):
    samples = {OURS: ours, PUBLISHED: published, TUNED: tuned, ANOMALIB: anomalib}
    return Figure("step/cached/8", "Steps", "batch 8", "s", samples, 8)


def test_goals_are_ratios_of_medians():
    figures = [
        step([0.5, 0.6, 0.9], [6.0], [2.0], [0.7]),
        Figure("evaluation/83", "Evaluation", "83 maps", "s", {OURS: [0.3], TUNED: [3.5]}),
        Figure("start/infer", "Start", "infer", "s", {OURS: [2.0]}),
        Figure("start/paddle", "Start", "paddle", "s", {OURS: [1.0]}),
    ]
    checked = {goal["text"]: (round(goal["value"], 3), goal["met"]) for goal in check_goals(figures)}
    assert list(checked.values()) == [
        (0.857, False),  # anomalib
        (0.1, True),  # published, defaults
        (0.3, False),  # published, tuned
        (0.3, True),
        (0.086, True),
        (2.0, False),
    ]
    assert check_goals([]) == []


def test_a_goal_compares_what_was_measured_in_the_same_turn():
    drifting = step([0.5, 1.0, 0.6], [6.0, 12.0, 6.0], [3.0], [1.0, 2.0, 0.8])
    ratios = [goal["value"] for goal in check_goals([drifting])]
    assert ratios == pytest.approx([0.5, 1 / 12, 0.2])  # of the medians the first would be 0.6


def test_a_goal_without_its_contender_is_left_out():
    figure = Figure("step/cached/8", "Steps", "batch 8", "s", {OURS: [0.5], PUBLISHED: [5.0]})
    assert [goal["value"] for goal in check_goals([figure])] == [0.1]


def test_summary_and_quartiles():
    assert quartiles([1.0]) == (1.0, 1.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    rates = summary(Figure("t", "T", "throughput", "images/s", {OURS: [30.0], PUBLISHED: [10.0]}))["results"]
    assert rates[PUBLISHED]["ours_is_better_by"] == pytest.approx(3)
    times = summary(step([0.5], [5.0], [2.0], [1.0]))["results"]
    assert times[PUBLISHED]["ours_is_better_by"] == pytest.approx(10)
    assert "ours_is_better_by" not in times[OURS]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.01234, "s", "12.3 ms"), (5.214, "s", "5.21 s"), (193.4, "s", "193 s"), (2.5e9, "bytes", "2.50 GB")],
)
def test_numbers_have_three_digits(value, unit, text):
    assert number(value, unit) == text


def test_the_table(tmp_path):
    figures = [
        step([0.5, 0.6, 0.7], [6.0], [2.0], [1.2]),
        Figure("memory/train.py", "Memory", "train.py", "bytes", {OURS: [2e9]}),
    ]
    results = {
        "date": "2022-11-22 12:00",
        "machine": describe_machine(),
        "threads": 2,
        "data": "drawn pictures",
        "weights": "random",
        "others_share": 0.01,
        "left_out": ["OpenVINO bf16: not here"],
        "largest_loss_difference": 1e-7,
        "figures": {figure.key: summary(figure) for figure in figures},
        "goals": check_goals(figures),
        "contenders": {OURS: {"description": "this", "process": {"paddle": "3.3.1", "runtime": {"A": "1"}}}},
    }
    text = markdown(json.loads(json.dumps(results)))
    assert "| | ours | published, defaults | published, tuned | anomalib |" in text
    assert "| batch 8 | 600 ms (550 ms to 650 ms) | 6 s, 10.00x | 2 s, 3.33x | 1.2 s, 2.00x |" in text
    assert "at most 0.8 of anomalib's | 0.500 | 0.800 | yes |" in text
    assert "3 GB | 2.00 GB | 3.00 GB | yes |" in text
    assert "(paddle=3.3.1, A=1)" in text
    assert "* left out: OpenVINO bf16: not here" in text
    assert "not quiet" not in text
    assert "not quiet" in markdown({**results, "others_share": 0.2})


def test_curves_are_drawn_of_two_points_or_more(tmp_path):
    figures = [
        Figure(f"size/{size}", "Growth", str(size), "s", {OURS: [size / 100, size / 90]}, size) for size in (128, 256)
    ]
    figures.append(Figure("threads/1", "Threads", "1", "s", {OURS: [1.0]}, 1))
    assert [path.name for path in draw_curves(figures, tmp_path)] == ["growth_size.png"]
    assert (tmp_path / "growth_size.png").stat().st_size > 5000


def test_help_does_not_import_a_framework():
    code = "import sys, benchmarks.__main__; sys.exit('paddle' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
