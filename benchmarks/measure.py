"""What is measured, in which order. The contenders take turns, so that a drift of the machine hits all alike."""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.inputs import ROOT, TEST, TRAIN, spread, write_bottle
from benchmarks.processes import QUIET, Contender, Worker, run_command
from benchmarks.report import ANOMALIB, ANOMALIB_NARROW, OURS, PUBLISHED, TUNED, Figure
from deploy.common.cli import UserError
from deploy.common.files import make_folder
from deploy.common.imaging import write_picture
from utils.config import load_config

MODEL_PICTURES = 200  # good ones, that a model is made of
SIDES = (512, 1024, 2048, 4096, 8192)
SIZE = 256
PAPER = ("resnet18", "wide_resnet50_2", "deit", "cait")  # configs/paper
NO_WEIGHTS = {"FASTFLOW_BACKBONE_WEIGHTS": ""}  # for another backbone than ResNet18, whose they are
Name = TypeVar("Name", bound=Hashable)  # of a contender


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int  # turns of each contender at a figure
    slow_rounds: int  # the same where a call of the published graph takes many seconds
    graph_rounds: int  # turns of the published graph at other steps and forward passes
    exported_rounds: int  # turns of each exported model, whose runs are short
    turn: float  # seconds of a turn at least; its sample is the median of its calls
    batches: tuple[int, ...]  # of training steps
    sizes: tuple[int, ...]  # of pictures, for the growth
    pictures: tuple[tuple[int, int], ...]  # training and test pictures of an epoch, for the growth; the last: the epoch
    epoch_rounds: int
    maps: tuple[int, ...]  # of an evaluation
    starts: int  # runs of each command
    cut: tuple[int, ...]  # sides of pictures that are cut into tiles
    scored: tuple[int, tuple[int, int]]  # pictures that score.py scores; lengths of lists that its driver goes through


FULL = Plan(
    rounds=5,
    slow_rounds=3,
    graph_rounds=5,
    exported_rounds=15,
    turn=1.5,
    batches=(8, 32),
    sizes=(128, 256, 384, 512),
    pictures=((25, 10), (75, 30), (TRAIN, TEST)),
    epoch_rounds=2,
    maps=(20, 40, TEST),
    starts=5,
    cut=SIDES,
    scored=(10_000, (10_000, 1_000_000)),
)
QUICK = Plan(
    rounds=3,
    slow_rounds=1,
    graph_rounds=1,
    exported_rounds=3,
    turn=0.5,
    batches=(8,),
    sizes=(64, 128),
    pictures=((8, 4), (16, 8)),
    epoch_rounds=1,
    maps=(20, TEST),
    starts=1,
    cut=SIDES[:2],
    scored=(200, (1000, 20_000)),
)


@contextmanager
def started(contenders: Mapping[Name, Contender]) -> Iterator[dict[Name, Worker]]:
    """A process for each contender; all end with the block."""
    workers: dict[Name, Worker] = {}
    try:
        for name, contender in contenders.items():
            workers[name] = Worker(contender)
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def interleaved(
    workers: Mapping[Name, Worker],
    rounds: Callable[[Name], int],
    ask: Callable[[Worker], Any],
    warm_up: Callable[[Worker], Any] | None = None,
) -> dict[Name, list[Any]]:
    """Let the contenders answer in turn; the answers of each. `rounds` says how many turns a contender gets."""
    if warm_up:
        for worker in workers.values():
            warm_up(worker)
    answers: dict[Name, list[Any]] = {name: [] for name in workers}
    for turn in range(max(rounds(name) for name in workers)):
        for name, worker in workers.items():
            if turn < rounds(name):
                answers[name].append(ask(worker))
    return answers


def same_losses(workers: Mapping[str, Worker]) -> float:
    """How much the first losses of ours and of the published graph differ at most, relatively.

    Raises:
        UserError: too much: they do not compute the same.
    """
    losses = [
        workers[name].ask_once("step", size=SIZE, batch=2, backbone=True, seconds=0)["loss"]
        for name in (OURS, PUBLISHED, TUNED)
    ]
    difference = max(abs(loss / losses[0] - 1) for loss in losses)
    if not difference <= 1e-3:
        raise UserError(f"the contenders' first losses differ, so nothing is compared: {losses}")
    return difference


def training_steps(workers: Mapping[str, Worker], plan: Plan) -> Iterator[Figure]:
    """Forward and backward, and both with the optimizer's update, by batch, without and with the backbone."""
    for batch in plan.batches:
        slow = {name: plan.slow_rounds for name in workers} if batch > 8 else _few_of_the_graph(plan)
        for kind, text in (("cached", "features cached"), ("backbone", "with the backbone")):
            answers = _steps(workers, SIZE, batch, kind == "backbone", plan, slow)
            title = f"batch {batch}, {text}"
            yield Figure(
                f"step/{kind}/{batch}", "Training step: forward and backward", title, "s", _medians(answers, "passes")
            )
            yield Figure(
                f"update/{kind}/{batch}", "Training step with the optimizer's update", title, "s",
                _medians(answers, "whole"),
            )  # fmt: skip


def forward_passes(workers: Mapping[str, Worker], plan: Plan) -> Iterator[Figure]:
    """The model in eval mode, pictures in memory to anomaly maps: latency of one, throughput of batches."""
    group = "Model in dygraph: pictures to anomaly maps"
    for batch in (1, 8):
        answers = interleaved(
            workers,
            lambda name: _few_of_the_graph(plan).get(name, plan.rounds),
            lambda worker, b=batch: worker.ask("forward", size=SIZE, batch=b, seconds=plan.turn),
            lambda worker, b=batch: worker.ask("forward", size=SIZE, batch=b, seconds=0),
        )
        samples = {name: [statistics.median(turn) for turn in turns] for name, turns in answers.items()}
        if batch == 1:
            yield Figure("latency", group, "latency of one picture", "s", samples)
        else:
            rates = {name: [batch / seconds for seconds in turns] for name, turns in samples.items()}
            yield Figure(f"throughput/{batch}", group, f"throughput, batch {batch}", "images/s", rates)


def export(worker: Worker, folder: Path, config: str = "configs/resnet18.yaml") -> Path:
    """The exported folder, in every format, of this worker's model, made by the config; `folder` is its parent."""
    worker.ask_once("save", file=str(folder / "results/inference/bottle/best.pdparams"))
    target = folder / "exported"
    command = [sys.executable, str(ROOT / "deploy/export_model.py"), "-cfg", str(ROOT / config)]
    command += ["-cat", "bottle", "--exp_dir", "inference", "--format", "all", "--save_inference_dir", str(target)]
    run_command(command, folder)
    return target


def inference(contenders: Mapping[tuple[str, str], Contender], plan: Plan) -> Iterator[Figure]:
    """Exported models, pictures in memory to anomaly maps. Contenders are named by runtime and by whose model it is.

    A run is short, so turns are as well and there are more of them: fewer seconds lie between the contenders.
    """
    rounds, turn = plan.exported_rounds, plan.turn / 3
    group = "Exported model: normalised pictures to anomaly maps"
    with started(contenders) as workers:
        for batch in (1, 8):
            answers = interleaved(
                workers,
                lambda name: rounds,
                lambda worker, b=batch: worker.ask("forward", size=SIZE, batch=b, seconds=turn),
                lambda worker, b=batch: worker.ask("forward", size=SIZE, batch=b, seconds=0),
            )
            for runtime in dict.fromkeys(runtime for runtime, _ in contenders):
                samples = {
                    who: [statistics.median(times) for times in answers[runtime, who]]
                    for other, who in contenders
                    if other == runtime
                }
                yield Figure(f"inference/{runtime}/{batch}", group, f"{runtime}, batch {batch}", "s", samples)
                if batch > 1:
                    rates = {who: [batch / seconds for seconds in turns] for who, turns in samples.items()}
                    title = f"{runtime}, throughput, batch {batch}"
                    yield Figure(f"inference/{runtime}/throughput/{batch}", group, title, "images/s", rates)


def evaluations(workers: Mapping[str, Worker], plan: Plan) -> Iterator[Figure]:
    """From raw maps in memory, by smoothing and sorting, to both AUROCs.

    Raises:
        UserError: ours and the published way give different AUROCs.
    """
    chosen = {name: workers[name] for name in (OURS, TUNED)}
    for count in plan.maps:
        answers = interleaved(
            chosen,
            lambda name: plan.rounds,
            lambda worker, c=count: worker.ask("evaluate", count=c, seconds=plan.turn),
            lambda worker, c=count: worker.ask("evaluate", count=c, seconds=0),
        )
        for kind in ("image", "pixel"):
            ours, published = (answers[name][0][kind] for name in (OURS, TUNED))
            if not abs(ours - published) <= 1e-5:
                raise UserError(f"{kind} AUROC of {count} maps: {ours} by ours, {published} by the published way")
        title = f"{count} maps of {SIZE} x {SIZE}"
        yield Figure(
            f"evaluation/{count}", "Evaluation: maps to both AUROCs", title, "s", _medians(answers, "seconds"), count
        )


def epochs(contenders: Mapping[str, Contender], plan: Plan, data: Path, category: str) -> Iterator[Figure]:
    """A first epoch with its evaluation, from picture files, in fresh processes; and their peak memory."""
    group = "Epoch with evaluation, from picture files"
    batch = 32  # the published one
    for train, test in plan.pictures:
        whole = (train, test) == plan.pictures[-1]
        growing = {name: c for name, c in contenders.items() if name != ANOMALIB_NARROW}
        if not whole:  # too slow to be had for a curve
            del growing[PUBLISHED]
        with started(growing) as workers:
            answers = interleaved(
                workers,
                lambda name, whole=whole: plan.epoch_rounds if whole and name in (OURS, ANOMALIB) else 1,
                lambda worker, n=train, m=test: worker.ask(
                    "epoch", data=str(data), category=category, train=n, test=m, batch=batch
                ),
            )
        title = f"{train} training and {test} test pictures"
        later = {name: [turn["training"] + turn["evaluation"] for turn in turns] for name, turns in answers.items()}
        first = {
            name: [turn["features"] + seconds for turn, seconds in zip(turns, later[name], strict=True)]
            for name, turns in answers.items()
        }
        complete = (train, test) == (TRAIN, TEST)
        yield Figure("epoch" if complete else f"epoch/{train}", group, f"first epoch, {title}", "s", first, train)
        yield Figure(
            "later epoch" if complete else f"later epoch/{train}", "Later epochs (ours keeps the features)", title, "s",
            later, train,
        )  # fmt: skip
        if whole:
            peaks = {name: [float(turn["peak"]) for turn in turns[:1]] for name, turns in answers.items()}
            yield Figure("memory/epoch", "Peak memory", f"process of that epoch, {title}", "bytes", peaks)


def sizes(workers: Mapping[str, Worker], plan: Plan) -> Iterator[Figure]:
    """How a training step grows with the side of the pictures."""
    chosen = {name: worker for name, worker in workers.items() if name != ANOMALIB_NARROW}
    for size in plan.sizes:
        rounds = {name: plan.slow_rounds for name in chosen} | {PUBLISHED: 1}
        answers = _steps(chosen, size, 8, True, plan, rounds)
        group = "Growth with picture size: forward and backward, batch 8, with the backbone"
        yield Figure(f"size/{size}", group, f"{size} x {size}", "s", _medians(answers, "passes"), size)


def threads(contenders: Mapping[str, Contender], plan: Plan, most: int) -> Iterator[Figure]:
    """How a training step shrinks with threads, in fresh processes."""
    counts = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    for count in counts:
        chosen = {
            name: replace(contenders[name], environment={**c.environment, "OMP_NUM_THREADS": str(count)})
            for name, c in contenders.items()
            if name in (OURS, TUNED, ANOMALIB)
        }
        with started(chosen) as workers:
            answers = _steps(workers, SIZE, 8, True, plan, {name: plan.slow_rounds for name in chosen})
        group = "Growth with threads: forward and backward, batch 8, with the backbone"
        yield Figure(f"threads/{count}", group, f"{count} threads", "s", _medians(answers, "passes"), count)


def commands(plan: Plan, data: Path, category: str, folder: Path, has_weights: bool) -> Iterator[Figure]:
    """Peak memory of train.py, and the cold start of each command. `folder` is where they write."""
    python = sys.executable
    config = ["-cfg", str(ROOT / "configs/resnet18.yaml")]
    run = [*config, "--exp_dir", "benchmark", "-cat", category]
    offline = [] if has_weights else ["-o", "pretrained=offline"]
    complete = len(list((data / category / "train/good").iterdir())) == TRAIN
    training = run_command(
        [python, str(ROOT / "train.py"), *run, "--data", str(data), "--epochs", "2", *offline], folder
    )
    key = "memory/train.py" if complete else "memory/train.py, few pictures"
    yield Figure(key, "Peak memory", "train.py, 2 epochs of all pictures", "bytes", {OURS: [float(training.peak)]})
    exported = ["--save_inference_dir", str(folder / "inference")]
    run_command([python, str(ROOT / "deploy/export_model.py"), *run, *exported], folder)
    picture = ["--image_path", str(ROOT / "images/bottle_good.png")]
    started_commands = {
        "start/python": ("python -c pass", ["-c", "pass"]),
        "start/paddle": ('python -c "import paddle"', ["-c", "import paddle"]),
        "start/infer": ("deploy/infer.py on one picture", [str(ROOT / "deploy/infer.py"), *exported, *picture]),
        "start/predict": ("predict.py on one picture", [str(ROOT / "predict.py"), *run, *picture]),
    }
    for name in ("train.py", "eval.py", "predict.py", "deploy/export_model.py", "deploy/infer.py"):
        started_commands[f"start/{name}"] = (f"{name} --help", [str(ROOT / name), "--help"])
    samples: dict[str, list[float]] = {key: [] for key in started_commands}
    for turn in range(plan.starts + 1):
        for key, (_, arguments) in started_commands.items():
            finished = run_command([python, *arguments], folder)
            if turn > 0:  # the first turn fills the disk's cache
                samples[key].append(finished.seconds)
    for key, (title, _) in started_commands.items():
        yield Figure(key, "Cold start of commands", title, "s", {OURS: samples[key]})


def tiles(plan: Plan, data: Path, category: str, folder: Path) -> Iterator[Figure]:
    """Time and peak memory of deploy/infer.py on one grey picture that is cut into tiles, by the picture's side.

    The time is the command's, from its start to its end. `folder` is where all is written.
    """
    python = sys.executable
    named = ["--exp_dir", "tiles", "-cat", category]
    config = ["-cfg", str(ROOT / "configs/resnet18.yaml"), "-o", "pretrained=offline", "-o", "steps=1"]
    config += ["-o", f"tile={SIZE}", "-o", "input_size=original", "-o", "eval_interval=-1"]
    run_command([python, str(ROOT / "train.py"), *config, *named, "--data", str(data)], folder)
    model = ["--save_inference_dir", str(folder / "tiles")]
    run_command([python, str(ROOT / "deploy/export_model.py"), *config, *named, *model, "--format", "onnx"], folder)
    command = [python, str(ROOT / "deploy/infer.py"), *model, "--backend", "openvino", "--batch_size", "8"]
    for side in plan.cut:
        picture = folder / f"{side}.png"
        noise = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
        write_picture(picture, noise)
        finished = run_command([*command, "--image_path", str(picture)], folder)
        picture.unlink()
        title = f"{side} x {side} pixels"
        yield Figure(f"tiles/{side}", "One picture in tiles of 256", title, "s", {OURS: [finished.seconds]}, side)
        yield Figure(
            f"tiles memory/{side}", "Peak memory of one picture in tiles of 256", title, "bytes",
            {OURS: [float(finished.peak)]},
        )  # fmt: skip


def time_to_model(data: Path, category: str, folder: Path, anomalib: str | None) -> Iterator[Figure]:
    """From the command to the exported model with its thresholds, of `MODEL_PICTURES` good pictures, in seconds.

    Ours trains `configs/auto.yaml`, calibrates and exports. anomalib does the same by its own recipe, and once more in
    as many steps as ours.

    Args:
        data: with a category that has so many pictures, else they are drawn.
        category: its name.
        folder: where all is written.
        anomalib: a Python that has it; None: nothing has.
    """
    source, target = data / category, folder / "model/data" / category
    pictures = sorted((source / "train/good").iterdir())
    if len(pictures) < MODEL_PICTURES:
        write_bottle(target, MODEL_PICTURES, TEST)
    else:
        for name in ("test", "ground_truth"):
            shutil.copytree(source / name, target / name)
        for picture in spread(pictures, MODEL_PICTURES):
            shutil.copy(picture, make_folder(target / "train/good"))

    config = ROOT / "configs/auto.yaml"
    run = ["-cfg", str(config), "--exp_dir", "model", "-cat", category]
    read = ["--data", str(target.parent)]
    commands = (
        ("train.py", read),
        ("eval.py", read),
        ("deploy/export_model.py", ["--format", "onnx", "--save_inference_dir", str(folder / "model/exported")]),
    )
    resnet18 = os.environ.get("FASTFLOW_BACKBONE_WEIGHTS", "")
    ours = sum(
        run_command([sys.executable, str(ROOT / name), *run, *options], folder, NO_WEIGHTS).seconds
        for name, options in commands
    )
    settings = load_config(config)
    known = resnet18 if resnet18.endswith(".npz") else None
    group = f"{MODEL_PICTURES} pictures, from the command to the exported model"
    for key, title, steps, batch in (
        ("model", "each by its own recipe", None, 32),
        ("model/steps", f"{settings.steps} steps of {settings.batch_size}", settings.steps, settings.batch_size),
    ):
        samples = {OURS: [ours]}
        if anomalib:
            time.sleep(QUIET)
            begun = time.perf_counter()
            with started({ANOMALIB: Contender(ANOMALIB, group, ("anomalib_model",), python=anomalib)}) as workers:
                made = str(folder / key / "anomalib")
                said = workers[ANOMALIB].ask_once(
                    "model", category=str(target), target=made, weights=known, steps=steps, batch=batch
                )
            samples[ANOMALIB] = [time.perf_counter() - begun]
            title += f"; anomalib: {said['epochs']} epochs, {said['steps']} steps"
        yield Figure(key, group, title, "s", samples)


def paper(
    exported_contenders: Callable[[Path], dict[tuple[str, str], Contender]], plan: Plan, folder: Path
) -> Iterator[Figure]:
    """The rows of the paper's table: a training step of 8 pictures, its memory, and one picture in each runtime.

    Args:
        exported_contenders: makes those of the exported model in a folder.
        plan: how long a turn is; there is one.
        folder: where the models are exported to.
    """
    for name in PAPER:
        config, group = f"configs/paper/{name}.yaml", "The paper's configurations"
        size = load_config(ROOT / config).size[0]
        with started({OURS: Contender(OURS, config, ("ours", config), NO_WEIGHTS)}) as workers:
            worker = workers[OURS]
            step = worker.ask("step", size=size, batch=8, backbone=False, seconds=plan.turn)
            yield Figure(
                f"paper/{name}/step", group, f"{name}: step, batch 8, features cached", "s", {OURS: step["passes"]}
            )
            peak = {OURS: [float(worker.ask_once("peak"))]}
            yield Figure(f"paper/{name}/memory", group, f"{name}: peak memory, batch 8", "bytes", peak)
            exported = export(worker, folder / name, config)
        for (runtime, who), contender in exported_contenders(exported).items():
            if who == OURS:
                with started({OURS: contender}) as workers:
                    workers[OURS].ask_once("forward", size=size, batch=1, seconds=0)
                    samples = workers[OURS].ask("forward", size=size, batch=1, seconds=plan.turn)
                title = f"{name}: {runtime}, one picture"
                yield Figure(f"paper/{name}/{runtime}", group, title, "s", {OURS: samples})
        shutil.rmtree(folder / name)  # gigabytes


def _few_of_the_graph(plan: Plan) -> dict[str, int]:
    """Turns of the published graph; none where it has as many as the others, for its goals want the same turns."""
    return {name: plan.graph_rounds for name in (PUBLISHED, TUNED)} if plan.graph_rounds < plan.rounds else {}


def note(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def _steps(
    workers: Mapping[str, Worker], size: int, batch: int, backbone: bool, plan: Plan, rounds: Mapping[str, int]
) -> dict[str, list[Any]]:
    """Answers of interleaved training steps, with `rounds` in place of the plan's where a contender stands in it.

    If Paddle's defaults are among those, their steps are slow: they are not warmed up.
    """

    def ask(worker: Worker, seconds: float) -> Any:
        return worker.ask("step", size=size, batch=batch, backbone=backbone, seconds=seconds)

    def warm_up(worker: Worker) -> None:
        if worker.contender.name != PUBLISHED or PUBLISHED not in rounds:
            ask(worker, 0)

    return interleaved(
        workers, lambda name: rounds.get(name, plan.rounds), lambda worker: ask(worker, plan.turn), warm_up
    )


def _medians(answers: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, list[float]]:
    """Of each turn's calls."""
    return {name: [statistics.median(turn[key]) for turn in turns] for name, turns in answers.items()}
