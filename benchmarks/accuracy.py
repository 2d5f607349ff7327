"""How the published and the stable configuration do on a real category: python -m benchmarks.accuracy

Runs `train.py` and `eval.py` for each configuration and seed, one after the other, and writes `accuracy.json` (every
epoch of every run, and both evaluations) and `accuracy.png` here. What a run that was cut off had done is kept: it
goes on where it stopped, and runs that are in `accuracy.json` are not run again; others join them. The pictures are
those that FASTFLOW_MVTEC_DIR names.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.__main__ import describe_machine
from benchmarks.inputs import ROOT
from deploy.common.cli import ArgumentParser, UserError, positive_int, run_main
from deploy.common.files import make_folder, write_text
from utils.plots import blank_figure, write_figure

CONFIGS = ("resnet18", "resnet18_stable")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmarks.accuracy", description="Train and evaluate several seeds, epoch by epoch.")
    parser.add_argument("--data", default=os.environ.get("FASTFLOW_MVTEC_DIR"), help="folder of the categories")
    parser.add_argument("--category", default="bottle", help="one of them (%(default)s)")
    parser.add_argument(
        "--configs", nargs="+", default=CONFIGS, metavar="NAME", help="of configs/ (both ResNet18 ones)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="(0 1 2)")
    parser.add_argument("--epochs", type=positive_int, default=40, help="(%(default)s)")
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the config, for all; repeatable",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder of the results (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.data:
        raise UserError("--data: name the folder of MVTec AD's categories, or set FASTFLOW_MVTEC_DIR")
    file = make_folder(args.output) / "accuracy.json"
    made_with = {"category": args.category, "options": args.options}
    runs = earlier_runs(file, made_with)
    for config in args.configs:
        for seed in args.seeds:
            asked = {"config": config, "seed": seed, "epochs": args.epochs}
            done = next((run for run in runs if asked.items() <= run.items()), None)
            if done:
                print(f"{config}, seed {seed}: measured on {done['date']}, in {file}")
                continue
            runs.append(asked | run(**asked, data=Path(args.data).absolute(), **made_with))
            runs.sort(key=lambda run: [run[key] for key in asked])
            write_text(file, json.dumps({**made_with, "runs": runs}, indent=1) + "\n")
    draw(args.output / "accuracy.png", runs, args.category)


def earlier_runs(file: Path, made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in this accuracy.json.

    Raises:
        UserError: they are of another category, or with other options.
    """
    if not file.exists():
        return []
    results = json.loads(file.read_text(encoding="utf-8"))
    for what, value in made_with.items():
        if results[what] != value:
            raise UserError(f"{file}: holds runs of {what} {results[what]}; give another --output for {value}")
    return results["runs"]


def run(config: str, seed: int, epochs: int, data: Path, category: str, options: list[str]) -> dict[str, Any]:
    """Train and evaluate once; no patience, so that every run has all its epochs."""
    experiment = "accuracy/" + "-".join(map(str, (config, seed, epochs, *options)))
    folder = ROOT / "results" / experiment
    common = ["-cfg", f"configs/{config}.yaml", "-cat", category, "--data", str(data), "--exp_dir", experiment]
    for option in (f"seed={seed}", f"patience={epochs}", *options):
        common += ["-o", option]
    command("train.py", *common, "--epochs", str(epochs), "--resume")
    evaluations = {}
    for name, which in (("chosen", []), ("last", ["--is_last"])):
        command("eval.py", *common, *which)
        row = json.loads((folder / "eval.json").read_text())["categories"][category]
        if row["backbone"]["file"]:  # where it lies on this machine is nobody's business
            row["backbone"]["file"] = Path(row["backbone"]["file"]).name
        evaluations[name] = row
    with open(folder / category / "history.csv", newline="") as file:
        history = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    made = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("paddlepaddle", "numpy")},
    }
    return {**made, "history": history, **evaluations}


def command(*words: str) -> None:
    """Run a script of the repository; what it says goes where ours does.

    Raises:
        UserError: it failed.
    """
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"{' '.join(words)} failed")


def draw(path: Path, runs: list[dict[str, Any]], category: str) -> None:
    """Image and pixel AUROC over the epochs, a colour a configuration, a line a seed, as PNG."""
    figure = blank_figure(11, 4)
    configs = list(dict.fromkeys(run["config"] for run in runs))
    for axes, kind in zip(figure.subplots(1, 2), ("image", "pixel"), strict=True):
        for run in runs:
            rows = [row for row in run["history"] if row[f"{kind}_auroc"] is not None]
            first = next(other for other in runs if other["config"] == run["config"]) is run
            axes.plot(
                [row["epoch"] for row in rows],
                [row[f"{kind}_auroc"] for row in rows],
                color=f"C{configs.index(run['config'])}",
                linewidth=1,
                label=run["config"] if first else None,
            )
        axes.set(title=f"{category}: {kind} AUROC on the test set", xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure)


if __name__ == "__main__":
    run_main(main)
