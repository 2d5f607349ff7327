"""How configurations do on real categories: python -m benchmarks.accuracy --data FOLDER

Trains and evaluates each category in a grid of configurations and seeds (`utils/grid.py`), one after the other, and
writes `accuracy.json`: every epoch of every run, with figures of the test set about every eighth of it, and the
evaluation of the last one; `python -m benchmarks.tables` makes the table of it. What a run that was cut off had done is
kept: it goes on where it stopped, and runs that are in `accuracy.json` are not run again; others join them.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.__main__ import describe_machine
from benchmarks.inputs import ROOT
from datasets.mvtec import hold_out, list_categories, load_category
from deploy.common.cli import ArgumentParser, UserError, positive_int, run_main
from deploy.common.files import make_folder, write_text
from utils.config import load_config
from utils.grid import Job, make_grid

EVALUATIONS = 8  # of a training, on the test set: those at 50% and 75% of it are what the table shows
RUN = ("category", "config", "options", "seed", "epochs", "steps")  # what tells one run from another


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmarks.accuracy", description="Train and evaluate categories, several seeds each."
    )
    mvtec = os.environ.get("FASTFLOW_MVTEC_DIR")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[Path(mvtec)] if mvtec else None,
        metavar="FOLDER",
        help="folders of categories (that of FASTFLOW_MVTEC_DIR)",
    )
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="of those in the folders (all)")
    parser.add_argument(
        "--configs", nargs="+", default=("auto", "resnet18"), metavar="NAME", help="of configs/ (auto resnet18)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="N", help="(0 1 2)")
    parser.add_argument(
        "--epochs", type=positive_int, default=40, metavar="N", help="of a config that has no steps (%(default)s)"
    )
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
        raise UserError("--data: name folders of categories, or one in FASTFLOW_MVTEC_DIR")
    categories = find_categories(args.data, args.categories)
    file = make_folder(args.output) / "accuracy.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    for (category, data), name in product(categories.items(), args.configs):
        path = str(ROOT / f"configs/{name}.yaml")
        config = load_config(path, args.options)
        pictures = len(hold_out(load_category(data, category).train, config.holdout, config.seed)[0])
        if config.steps is None:
            epochs, budget = args.epochs, f"epochs={args.epochs}"
        else:
            epochs, budget = math.ceil(config.steps / math.ceil(pictures / config.batch_size)), f"steps={config.steps}"
        # Whatever the config would choose or stop by: a run has its whole budget.
        rules = [*args.options, budget, "selection=last", f"eval_interval={max(1, epochs // EVALUATIONS)}"]
        experiment = Path("accuracy", "-".join([budget, *args.options]))
        for cell in make_grid([path], args.seeds, rules, str(data), str(experiment)):
            seed = cell.config.seed
            values = (category, name, args.options, seed, epochs if config.steps is None else None, config.steps)
            asked = dict(zip(RUN, values, strict=True))
            done = next((run for run in runs if asked.items() <= run.items()), None)
            if done:
                print(f"{category}, {name}, seed {seed}: measured on {done['date']}, in {file}")
                continue
            runs.append({**asked, "pictures": pictures, **measure(Job(category, cell), experiment)})
            runs.sort(key=lambda run: [str(run[key]) for key in RUN])
            write_text(file, json.dumps({"runs": runs}, indent=1) + "\n")


def find_categories(folders: list[Path], wanted: list[str] | None) -> dict[str, Path]:
    """The folder that holds each category, as an absolute path.

    Raises:
        UserError: no category is found, one that is wanted is not, or two have the same name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for name in list_categories(folder):
            if name in found and (not wanted or name in wanted):
                raise UserError(f"--data: {found[name]} and {folder} both have a category {name}; rename one of them")
            found[name] = folder.absolute()
    missing = [name for name in wanted or () if name not in found]
    if missing:
        raise UserError(f"--categories: not under --data: {', '.join(missing)}; there are: {', '.join(found)}")
    return {name: found[name] for name in wanted or found}


def measure(job: Job, experiment: Path) -> dict[str, Any]:
    """Train and evaluate once, below this folder of results."""
    words = [*job.cell.options, "-cat", job.category]
    command("train.py", *words, "--resume")
    command("eval.py", *words, "--is_last")
    folder = ROOT / "results" / experiment / job.cell.folder
    last = json.loads((folder / "eval.json").read_text())["categories"][job.category]
    # Where weights and pictures lie on this machine is nobody's business.
    if last["backbone"]["file"]:
        last["backbone"]["file"] = Path(last["backbone"]["file"]).name
    if last["regions"]:
        del last["regions"]["pictures"]
    with open(folder / job.category / "history.csv", newline="") as file:
        history = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    made = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("paddlepaddle", "numpy")},
    }
    return {**made, "history": history, "last": last}


def command(*words: str) -> None:
    """Run a script of the repository; what it says goes where ours does.

    Raises:
        UserError: it failed.
    """
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"{' '.join(words)} failed")


if __name__ == "__main__":
    run_main(main)
