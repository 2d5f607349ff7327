"""Several configs and seeds: the trainings that they ask for, and the table of their means and spreads."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from deploy.common.cli import UserError
from utils.config import Config, load_config
from utils.results import figure

FIGURES = ("image_auroc", "pixel_auroc")


@dataclass(frozen=True)
class Cell:
    """A config and a seed of the grid."""

    config: Config
    config_name: str
    folder: str  # below the experiment's; empty where one config has the seed that it names itself
    options: list[str]  # of train.py and eval.py, without the category


@dataclass(frozen=True)
class Job:
    """A category to train in a cell."""

    category: str
    cell: Cell

    @property
    def name(self) -> str:
        """What tells it from the others, and its folder below the experiment's."""
        return str(Path(self.cell.folder, self.category))


def make_grid(
    files: Sequence[str], seeds: Sequence[int] | None, overrides: Sequence[str], data: str, exp_dir: str
) -> list[Cell]:
    """All configs with all seeds.

    Args:
        files: the configs; their names without suffix name the folders.
        seeds: None for the one that each config has.
        overrides: KEY=VALUE, of all configs.
        data, exp_dir: options of train.py and eval.py.

    Raises:
        UserError: a config cannot be read, or two have the same name.
    """
    if len({Path(file).stem for file in files}) < len(files):
        raise UserError(f"-cfg {' -cfg '.join(files)}: two have the same name; rename a file")
    grid = list(product(files, [None] if seeds is None else seeds))
    cells = []
    for file, seed in grid:
        name = Path(file).stem
        folder = f"{name}-{seed}" if seed is not None else name if len(grid) > 1 else ""
        own = [*overrides, *([] if seed is None else [f"seed={seed}"])]
        options = ["-cfg", file, "--data", data, "--exp_dir", str(Path(exp_dir, folder)) if folder else exp_dir]
        options += [word for override in own for word in ("-o", override)]
        cells.append(Cell(load_config(file, own), name, folder, options))
    return cells


def grid_table(folder: Path, cells: Sequence[Cell]) -> str:
    """What eval.py found, a line for each config and category, and one for the mean of its categories.

    A figure is the mean over the seeds and, of several, their sample standard deviation.

    Args:
        folder: of the experiment; below it each cell has an eval.json, unless its evaluation failed.
        cells: those of a config one after the other.
    """
    rows = [("config", "category", "seeds", *(f"{name.partition('_')[0]} AUROC" for name in FIGURES))]
    for config, own in groupby(cells, lambda cell: cell.config_name):
        found = [_evaluated(folder / cell.folder / "eval.json") for cell in own]
        for category in [*sorted(set().union(*found) - {"mean"}), "mean"]:
            figures = [measured[category] for measured in found if category in measured]
            texts = (mean_and_spread([row[name] for row in figures if row[name] is not None]) for name in FIGURES)
            rows.append((config, category, str(len(figures)), *texts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def mean_and_spread(values: Sequence[float]) -> str:
    """For example `0.965 ± 0.002`; of one value without a spread, of none `n/a`."""
    text = figure(statistics.mean(values) if values else None)
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def _evaluated(path: Path) -> dict[str, Any]:
    """The figures by category, and those of their mean."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {**content["categories"], "mean": content["mean"]}
