"""Benchmark: python -m benchmarks [--quick] [--anomalib_python FILE]"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cluster, measure
from benchmarks.inputs import ROOT, write_bottle
from benchmarks.measure import FULL, QUICK, Plan, note, started
from benchmarks.processes import Contender, OtherProcesses
from benchmarks.report import (
    ANOMALIB,
    ANOMALIB_NARROW,
    OURS,
    PUBLISHED,
    TUNED,
    Figure,
    check_goals,
    markdown,
    number,
    summary,
)
from deploy.common import runtime
from deploy.common.cli import ArgumentParser, UserError, positive_int, run_main
from deploy.common.files import make_folder, write_text

DATA, WEIGHTS = "FASTFLOW_MVTEC_DIR", "FASTFLOW_BACKBONE_WEIGHTS"
SECTIONS = ("steps", "forward", "inference", "evaluation", "sizes", "epochs", "threads", "commands")
LONG = ("tiles", "cluster", "model", "paper")  # not with --quick
RUNTIMES = {  # of exported models: backend, precision and --winograd of ours
    "own framework fp32": ("paddle", "fp32", False),
    "ONNX Runtime fp32": ("onnxruntime", "fp32", False),
    "OpenVINO fp32": ("openvino", "fp32", False),
    "OpenVINO fp32 --winograd": ("openvino", "fp32", True),
    "OpenVINO bf16": ("openvino", "bf16", False),
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmarks", description="Measure ours against the published graph and anomalib, on the CPU."
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes, few samples")
    parser.add_argument("--threads", type=positive_int, help="of every contender but Paddle's defaults (all cores)")
    parser.add_argument(
        "--anomalib_python",
        type=Path,
        default=Path(sys.prefix) / "anomalib/bin/python",
        help="a Python that has anomalib, if this one has not (%(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS + LONG,
        help=f"parts to measure (all; with --quick all but {', '.join(LONG)})",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder of the results (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    make_folder(args.output)
    plan = QUICK if args.quick else FULL
    sections = args.only or (SECTIONS if args.quick else SECTIONS + LONG)
    threads = args.threads or runtime.available_cores()
    contenders = make_contenders(args.threads, threads)
    python, no_anomalib = find_anomalib(args.anomalib_python)
    if python:
        contenders |= anomalib_contenders(python, threads)
    runtimes, no_precision = find_runtimes() if {"inference", "paper"} & set(sections) else ({}, None)
    no_ray = None
    if "cluster" in sections and not importlib.util.find_spec("ray"):
        sections = [name for name in sections if name != "cluster"]
        no_ray = "Ray is not installed (pip install -r requirements-cluster.txt): its section is left out"
    left_out = [reason for reason in (no_anomalib, no_precision, no_ray) if reason]
    for reason in left_out:
        note(reason)
    if os.environ.get(WEIGHTS):
        os.environ[WEIGHTS] = str(Path(os.environ[WEIGHTS]).absolute())
    results: dict[str, Any] = {
        "date": subprocess.run(["date", "+%Y-%m-%d %H:%M"], capture_output=True, text=True, check=True).stdout.strip(),
        "quick": args.quick,
        "machine": describe_machine(),
        "threads": threads,
        "versions": {name: version(name) for name in ("paddlepaddle", "numpy", "scipy", "scikit-learn")},
        "left_out": left_out,
    }
    others = OtherProcesses()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.environ.get(DATA):
            data, results["data"] = Path(os.environ[DATA]).absolute(), "pictures of MVTec AD's bottle"
        else:
            data, results["data"] = folder / "data", "drawn pictures of bottle's counts and size"
            note("drawing pictures")
            write_bottle(data / "bottle", *plan.pictures[-1])
        results["weights"] = "those of " + Path(os.environ[WEIGHTS]).name if os.environ.get(WEIGHTS) else "random"

        figures: list[Figure] = []

        def keep(figure: Figure) -> None:
            figures.append(figure)
            medians = ", ".join(f"{name} {number(figure.median(name), figure.unit)}" for name in figure.samples)
            note(f"{figure.group}: {figure.title}: {medians}")
            results["figures"] = {figure.key: summary(figure) for figure in figures}
            results["goals"] = check_goals(figures)
            write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")

        exported = functools.partial(inference_contenders, runtimes=runtimes, threads=threads, python=python)
        for figure in measured(sections, contenders, plan, data, folder, threads, exported, python, results):
            keep(figure)
        results["others_share"] = others.share()  # Ray's processes are no children of this one
        if "cluster" in sections:
            config = "configs/auto.yaml"
            with started({OURS: Contender(OURS, config, ("ours", config), measure.NO_WEIGHTS)}) as workers:
                model = measure.export(workers[OURS], folder / "cluster", config)
            for figure in cluster.scoring(model, data / "bottle/train/good", *plan.scored, folder / "cluster"):
                keep(figure)
    write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(args.output / "results.md", markdown(results))

    from benchmarks.plots import draw_curves

    draw_curves(figures, args.output)
    print(markdown(results))


def measured(
    sections: Iterable[str],
    contenders: dict[str, Contender],
    plan: Plan,
    data: Path,
    folder: Path,
    threads: int,
    exported_contenders: Callable[[Path], dict[tuple[str, str], Contender]],
    anomalib: str | None,
    results: dict[str, Any],
) -> Iterator[Figure]:
    """All figures of the sections; what the contenders say of themselves goes into `results`.

    `exported_contenders` makes those of the exported model in a folder; `anomalib` is a Python that has it.
    """
    with started(contenders) as workers:
        results["contenders"] = {
            name: {"description": contenders[name].description, "process": worker.description}
            for name, worker in workers.items()
        }
        results["largest_loss_difference"] = measure.same_losses(workers)
        if "steps" in sections:
            yield from measure.training_steps(workers, plan)
        if "forward" in sections:
            yield from measure.forward_passes(workers, plan)
        if "evaluation" in sections:
            yield from measure.evaluations(workers, plan)
        if "sizes" in sections:
            yield from measure.sizes(workers, plan)
        exported = measure.export(workers[OURS], folder) if "inference" in sections else None
    if exported:
        yield from measure.inference(exported_contenders(exported), plan)
    if "epochs" in sections:
        yield from measure.epochs(contenders, plan, data, "bottle")
    if "threads" in sections:
        yield from measure.threads(contenders, plan, threads)
    if "commands" in sections:
        yield from measure.commands(plan, data, "bottle", folder, bool(os.environ.get(WEIGHTS)))
    if "tiles" in sections:
        yield from measure.tiles(plan, data, "bottle", folder)
    if "model" in sections:
        yield from measure.time_to_model(data, "bottle", folder, anomalib)
    if "paper" in sections:
        yield from measure.paper(exported_contenders, plan, folder / "paper")


def make_contenders(asked: int | None, threads: int) -> dict[str, Contender]:
    """Ours and the published graph. Ours chooses its threads by itself unless the user asked for a number."""
    best = {"OMP_NUM_THREADS": str(threads)}
    path = runtime.mkl_code_path(runtime.cpu_flags())
    if path:
        best["MKL_DEBUG_CPU_TYPE"] = path
    graph = (
        "the published graph and evaluation in straightforward Paddle (benchmarks/published.py), the same parameters "
        "and inputs as ours; in epochs it reads pictures and computes features every time"
    )
    chosen = (
        Contender(
            OURS,
            "this repository, by the functions that train.py and eval.py call; its forward pass also smooths the map",
            ("ours",),
            {"OMP_NUM_THREADS": str(asked)} if asked else {},
        ),
        Contender(PUBLISHED, f"{graph}; Paddle's default environment", ("published",)),
        Contender(TUNED, f"the same in the best environment: {best}", ("published",), best),
    )
    return {contender.name: contender for contender in chosen}


def anomalib_contenders(python: str, threads: int) -> dict[str, Contender]:
    """anomalib's model at the published hidden width, and at its own, which is a little narrower and aligned."""
    model = (
        "anomalib's FastflowModel and FastflowLoss in PyTorch, resnet18, conv3x3_only=True, flow_steps=8 (its step has "
        "one coupling, a published one two, so both have 8 couplings a scale), LayerNorm, random weights"
    )
    environment = {"OMP_NUM_THREADS": str(threads)}
    chosen = (
        Contender(
            ANOMALIB,
            f"{model}, hidden_ratio=1.06: convolutions of the same number and shapes as ours",
            ("anomalib", "1.06"),
            environment,
            python,
        ),
        Contender(
            ANOMALIB_NARROW,
            "the same with hidden_ratio=1.0, its default: 3 to 6% fewer hidden channels, "
            "whose number fits the CPU's vectors",
            ("anomalib", "1.0"),
            environment,
            python,
        ),
    )
    return {contender.name: contender for contender in chosen}


def inference_contenders(
    exported: Path, runtimes: dict[str, tuple[str, str, bool]], threads: int, python: str | None
) -> dict[tuple[str, str], Contender]:
    """Our exported model in each runtime, anomalib's in PyTorch and in OpenVINO, by runtime and whose it is.

    `runtimes` are some of `RUNTIMES`; `python` has anomalib, None: nothing has.
    """
    environment = {"OMP_NUM_THREADS": str(threads)}
    chosen = {}
    for runtime_name, (backend, precision, winograd) in runtimes.items():
        arguments = ("exported", str(exported), backend, precision, str(winograd), str(threads))
        chosen[runtime_name, OURS] = Contender(OURS, f"ours in {runtime_name}", arguments)
        for name, ratio in ((ANOMALIB, "1.06"), (ANOMALIB_NARROW, "1.0")) if python else ():
            theirs = {
                "paddle": ("anomalib", ratio),  # in PyTorch
                "openvino": ("anomalib_openvino", ratio, precision, str(threads)),
            }
            if backend in theirs:
                description = f"{name} in {runtime_name}"
                chosen[runtime_name, name] = Contender(name, description, theirs[backend], environment, python)
    return chosen


def find_runtimes() -> tuple[dict[str, tuple[str, str, bool]], str | None]:
    """Those of `RUNTIMES` whose precision this CPU has; a line that names the others, if there are any.

    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "the exported models want `pip install -r requirements-deploy.txt`; make bench does it"
        ) from error

    kinds = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    missing = [
        name
        for name, (backend, precision, _) in RUNTIMES.items()
        if backend == "openvino" and precision.upper() not in kinds
    ]
    runtimes = {name: choice for name, choice in RUNTIMES.items() if name not in missing}
    return runtimes, f"{', '.join(missing)}: this CPU has no such precision in OpenVINO" if missing else None


def find_anomalib(python: Path) -> tuple[str | None, str | None]:
    """A Python that has anomalib; else None, and a line that says so."""
    if importlib.util.find_spec("anomalib"):
        python = Path(sys.executable)
    elif not python.exists():
        return None, f"anomalib is not installed (no {python}): its columns are left out, see benchmarks/README.md"
    code = "from benchmarks import torchvision_operators; import openvino, benchmarks.contenders.anomalib"
    found = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        reason = found.stderr.strip().splitlines()[-1:]
        return None, f"anomalib cannot be imported by {python} ({' '.join(reason)}): its columns are left out"
    return str(python), None


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory and system."""
    model = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    flags = runtime.cpu_flags()
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    kilobytes = int(meminfo.read_text().split()[1]) if meminfo.exists() else 0
    return {
        "cpu": f"{model} ({' '.join(vectors)})",
        "cores": runtime.available_cores(),
        "memory_gb": kilobytes * 1024 / 1e9,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


if __name__ == "__main__":
    run_main(main, "-r requirements-dev.txt")
