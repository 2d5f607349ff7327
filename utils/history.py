"""What happened epoch by epoch: which one is best, when to stop, as CSV and as a picture."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from deploy.common.files import write_text
from utils.config import Config
from utils.plots import blank_figure, write_figure
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


def is_evaluated(epoch: int, config: Config) -> bool:
    """Whether the test pictures and those held out are scored after this epoch, counted from 1."""
    return config.eval_interval > 0 and (epoch % config.eval_interval == 0 or epoch == config.epochs)


def finished(history: Sequence[EpochRow], config: Config) -> bool:
    """Whether train.py has nothing more to do after these epochs."""
    return len(history) >= config.epochs or waited_for(history) >= config.patience


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
    """Loss, and the AUROCs where they were measured, over the epochs, as PNG."""
    title = title.encode(errors="replace").decode()  # fonts know no bytes of names that are no text
    picture = blank_figure(10, 4)
    left, right = picture.subplots(1, 2)
    left.plot([row.epoch for row in history], [row.loss for row in history], marker=".", label="training")
    held_out = [row for row in history if row.val_loss is not None]
    if held_out:
        left.plot([r.epoch for r in held_out], [r.val_loss for r in held_out], marker=".", label="held out")
        left.legend()
    left.set_title(f"{title}: loss", parse_math=False)  # names may hold a $
    left.set(xlabel="epoch", ylabel="negative log-likelihood per dimension")
    for name in ("image_auroc", "pixel_auroc"):
        measured = [row for row in history if getattr(row, name) is not None]
        if measured:
            label = name.replace("_auroc", " AUROC")
            right.plot([r.epoch for r in measured], [getattr(r, name) for r in measured], marker=".", label=label)
    right.set_title(f"{title}: test set", parse_math=False)
    right.set(xlabel="epoch", ylabel="AUROC")
    best = best_row(history)
    if best:
        right.axvline(best.epoch, color="grey", linestyle=":", label=f"chosen: epoch {best.epoch}")
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_figure(path, picture)
