"""What happened epoch by epoch: which one is best, when to stop, as CSV and as a picture."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from deploy.files import write_text, write_whole
from utils.config import SelectionWeights


@dataclass(frozen=True)
class EpochRow:
    """One epoch. AUROCs and `selection` are None where nothing was measured."""

    epoch: int  # from 1
    loss: float  # mean over the pictures of the epoch
    lr: float
    image_auroc: float | None
    pixel_auroc: float | None
    selection: float | None  # what chooses the best checkpoint
    seconds: float


def selection_value(image: float | None, pixel: float | None, weights: SelectionWeights) -> float | None:
    """Weighted sum of the AUROCs; of the one there is, if the other could not be measured."""
    if image is None or pixel is None:
        return pixel if image is None else image
    return weights.image * image + weights.pixel * pixel


def best_row(history: Sequence[EpochRow]) -> EpochRow | None:
    """The published rule: the highest selection value; on a tie the later epoch, unless its pixel AUROC is lower.

    Without any measured epoch the last one stands in.
    """
    best = None
    for row in history:
        if row.selection is None:
            continue
        tie_lost = best and row.selection == best.selection and (row.pixel_auroc or 0) < (best.pixel_auroc or 0)
        if best is None or (row.selection >= best.selection and not tie_lost):
            best = row
    return best or (history[-1] if history else None)


def waited_for(history: Sequence[EpochRow]) -> int:
    """Epochs since the best one, known only right after an evaluation; 0 otherwise."""
    if not history or history[-1].selection is None:
        return 0
    return history[-1].epoch - best_row(history).epoch


def write_csv(path: Path, history: Sequence[EpochRow]) -> None:
    """One line an epoch, full precision, empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    write_text(path, text.getvalue())


def draw_curves(path: Path, history: Sequence[EpochRow], title: str) -> None:
    """Loss, and the AUROCs where they were measured, over the epochs, as PNG."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)  # its first run tells of its font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import and needed once
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row.epoch for row in history], [row.loss for row in history], marker=".")
    left.set_title(f"{title}: training loss", parse_math=False)  # names may hold a $
    left.set(xlabel="epoch", ylabel="negative log-likelihood per dimension")
    for name in ("image_auroc", "pixel_auroc"):
        measured = [row for row in history if getattr(row, name) is not None]
        if measured:
            label = name.replace("_auroc", " AUROC")
            right.plot([r.epoch for r in measured], [getattr(r, name) for r in measured], marker=".", label=label)
    right.set_title(f"{title}: test set", parse_math=False)
    right.set(xlabel="epoch", ylabel="AUROC")
    best = best_row(history)
    if best and best.selection is not None:
        right.axvline(best.epoch, color="grey", linestyle=":", label=f"best: epoch {best.epoch}")
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_whole(path, lambda name: figure.savefig(name, dpi=100))
