"""What happened epoch by epoch: which one is best, when to stop, as CSV and as a picture."""

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from deploy.common.files import write_text
from utils.config import Config
from utils.plots import blank_figure, drawable, write_figure
from utils.results import figure, rounded


@dataclass(frozen=True)
class EpochRow:
    """One epoch. AUROCs, `selection` and `val_loss` are None where nothing was measured."""

    epoch: int  # from 1
    loss: float  # mean over the pictures of the epoch
    lr: float
    image_auroc: float | None
    pixel_auroc: float | None
    selection: float | None  # what chooses the best checkpoint: the highest
    seconds: float
    val_loss: float | None = None  # mean over the held-out pictures
    steps: int | None = None  # of the optimizer up to its end; None in files of versions that did not count them


def selection_value(config: Config, image: float | None, pixel: float | None, val_loss: float | None) -> float | None:
    """What the config's selection rule makes as large as possible.

    Returns:
        test_auroc: the weighted sum of the AUROCs to three decimals, as published; the one there is, if the other could
            not be measured.
        val_likelihood: the log-likelihood per dimension of the held-out pictures, without the loss's constant.
        last: None, so that the last epoch stands in and nothing is waited for.
    """
    if config.selection == "last":
        return None
    if config.selection == "val_likelihood":
        return None if val_loss is None else -val_loss
    weights, image, pixel = config.selection_weights, rounded(image), rounded(pixel)
    if image is None or pixel is None:
        return pixel if image is None else image
    return weights.image * image + weights.pixel * pixel


def best_row(history: Sequence[EpochRow]) -> EpochRow | None:
    """The published rule: the highest selection value; on a tie the later epoch, unless its pixel AUROC is lower.

    That AUROC too is compared to three decimals. Without any measured epoch the last one stands in.
    """

    def rank(row: EpochRow) -> tuple[float, float, int]:
        return row.selection, rounded(row.pixel_auroc) or 0.0, row.epoch

    measured = [row for row in history if row.selection is not None]
    return max(measured, key=rank) if measured else (history[-1] if history else None)


def waited_for(history: Sequence[EpochRow]) -> int:
    """Epochs since the best one, known only right after an evaluation; 0 otherwise."""
    if not history or history[-1].selection is None:
        return 0
    return history[-1].epoch - best_row(history).epoch


def may_stop(config: Config) -> bool:
    """Whether patience may end a training before its last epoch: something chooses the best one."""
    return config.selection != "last" and config.eval_interval > 0


def is_evaluated(epoch: int, last: int, config: Config) -> bool:
    """Whether the test pictures and those held out are scored after this epoch, counted from 1, of `last` ones."""
    return config.eval_interval > 0 and (epoch % config.eval_interval == 0 or epoch == last)


def trained_enough(history: Sequence[EpochRow], config: Config) -> bool:
    """Whether the config's budget is used up after these epochs.

    Steps that were not counted count as none.
    """
    if config.steps is None:
        return len(history) >= config.epochs
    return bool(history) and (history[-1].steps or 0) >= config.steps


def finished(history: Sequence[EpochRow], config: Config) -> bool:
    """Whether train.py has nothing more to do after these epochs."""
    return trained_enough(history, config) or waited_for(history) >= config.patience


def epoch_line(history: Sequence[EpochRow]) -> str:
    """The published log line of the last epoch, with what was measured."""
    row = history[-1]
    parts = [f"Epoch {row.epoch} - loss = {row.loss:.3f}"]
    if row.val_loss is not None:
        parts.append(f"held-out loss = {row.val_loss:.3f}")
    if row.image_auroc is not None or row.pixel_auroc is not None:
        parts += [f"pixel auroc: {figure(row.pixel_auroc)}", f"image auroc: {figure(row.image_auroc)}"]
    return " - ".join([*parts, f"best epoch: {best_row(history).epoch}", f"{row.seconds:.1f} sec"])


def write_csv(path: Path, history: Sequence[EpochRow]) -> None:
    """One line an epoch, full precision, empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    write_text(path, text.getvalue())


def draw_curves(path: Path, history: Sequence[EpochRow], title: str) -> None:
    """Losses, and the AUROCs where they were measured, over the epochs, as PNG; no file without an epoch.

    Each panel has room for what most epochs need (see `shown_range`); the legend tells of what lies outside. A title
    that the font cannot write is left out.

    Raises:
        UserError: it cannot be written.
    """
    panels = []
    for name, unit, lower_is_better, labels in (
        ("loss", "negative log-likelihood per dimension", True, {"loss": "training", "val_loss": "held out"}),
        ("test set", "AUROC", False, {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}),
    ):
        curves = {label: _curve(history, key) for key, label in labels.items()}
        curves = {label: curve for label, curve in curves.items() if curve.size}
        if curves:
            shown = shown_range([values for _, values in curves.values()], lower_is_better)
            panels.append((f"{title}: {name}" if drawable(title) else name, unit, curves, shown))
    if not panels:
        path.unlink(missing_ok=True)
        return
    chosen = best_row(history).epoch
    picture = blank_figure(5 * len(panels), 4.5)
    places = picture.subplots(1, len(panels), squeeze=False)[0]
    for axes, (heading, unit, curves, (low, high)) in zip(places, panels, strict=True):
        for label, (epochs, values) in curves.items():
            outside = values[~((low <= values) & (values <= high))]
            if len(outside):
                label += f" ({len(outside)} of {len(values)} outside, to {outside[np.abs(outside).argmax()]:.3g})"
            axes.plot(epochs, values, marker="." if len(values) <= 100 else None, label=label)
        axes.axvline(chosen, color="grey", linestyle=":", label=f"chosen: epoch {chosen}")
        axes.set_title(textwrap.fill(heading, 48), parse_math=False)  # names may hold a $
        axes.set(xlabel="epoch", ylabel=unit, xlim=(0.5, history[-1].epoch + 0.5), ylim=(low, high))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
        axes.grid(alpha=0.3)
    write_figure(path, picture)


def _curve(history: Sequence[EpochRow], key: str) -> np.ndarray:
    """(2, K): the epochs in which it was measured, and its values."""
    measured = [(row.epoch, getattr(row, key)) for row in history if getattr(row, key) is not None]
    return np.reshape(measured, (-1, 2)).T


def shown_range(curves: Sequence[np.ndarray], lower_is_better: bool) -> tuple[float, float]:
    """The lowest and the highest value that a picture of the curves, (K,) each over the epochs, has room for.

    They are those between the curves' deciles, and as far again on both sides, without the first epoch's: it would
    flatten the others. Neither do values count that are worse than it, where the training diverged, unless most are.
    The range is 0.01 or more, so that three decimals tell its values apart.
    """
    shown = []
    for values in curves:
        values = values[np.isfinite(values)]
        later = values[1:] if len(values) > 2 else values
        if not len(later):
            continue
        sound = later[later <= values[0]] if lower_is_better else later
        lower, upper = np.quantile(sound if 2 * len(sound) > len(later) else later, (0.1, 0.9))
        reach = upper - lower
        shown.append(values[(lower - reach <= values) & (values <= upper + reach)])
    values = np.concatenate(shown) if shown else np.zeros(1)
    low, high = values.min(), values.max()
    margin = max(0.05 * (high - low), 0.005)
    return low - margin, high + margin
