"""The lines of a training, on the terminal and in train.log."""

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.common.cli import UserError

if TYPE_CHECKING:
    from tqdm import tqdm  # scripts import it where they can say that it is missing

# How the parts of a line begin that a narrow terminal can do without, which train.log has; the first of them first. An
# epoch's AUROCs are in the line before.
DISPENSABLE = ("avg_", "lr:", ("pixel auroc:", "image auroc:"), "held-out loss")


def make_logger(path: Path, silent: bool) -> logging.Logger:
    """A logger that prints plain lines and adds them to the end of the file; a silent one drops them.

    A terminal gets them as `fitted` to it, whatever reads them elsewhere as they are.

    Logging raises a UserError where the file cannot be written later on, and goes on without a terminal.

    Raises:
        UserError: the file cannot be written.
    """
    logger = logging.getLogger(str(path))
    logger.propagate = False
    if silent:
        logger.setLevel(logging.CRITICAL)  # to drop them in a handler would not do: tqdm puts in one of its own
        return logger
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a training goes on without its terminal; logging would print a traceback a line
    try:
        handlers = [logging.StreamHandler(sys.stdout), _LogFile(path, encoding="utf-8", errors="backslashreplace")]
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if sys.stdout.isatty():
        handlers[0].setFormatter(_Fitted())
    return logger


def fitted(line: str) -> str:
    """A log line for the terminal: where it is too narrow, without what matters least there, then in several lines."""
    from tqdm.utils import disp_len  # columns; a Chinese sign takes two

    columns = shutil.get_terminal_size().columns
    parts = line.split(" - ")
    for least in DISPENSABLE:
        if disp_len(" - ".join(parts)) > columns:
            parts = [part for part in parts if not part.startswith(least)]
    lines = [""]
    for word in " - ".join(parts).split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if disp_len(longer) > columns and lines[-1].strip():
            longer = f"    {word}"
            lines.append("")
        lines[-1] = longer
    return "\n".join(lines)


def time_bar(done: int, total: int, at_most: bool) -> "tqdm":
    """A bar on the terminal that shows the time that passed and the time that is left, by the mean of the steps so far.

    Args:
        done: steps that an earlier process has done.
        total: steps in all.
        at_most: the end may come earlier.
    """
    from tqdm import tqdm

    form = f"{{desc}} {{bar}} {{elapsed}}, {'at most ' * at_most}{{remaining}} left"
    return tqdm(total=total, initial=done, bar_format=form, smoothing=0, dynamic_ncols=True, leave=False, disable=None)


class _Fitted(logging.Formatter):
    """Lines as `fitted` to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(super().format(record))


class _LogFile(logging.FileHandler):
    """A file that raises a UserError where it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]  # sys.exception() is of Python 3.11
        raise UserError(f"{self.baseFilename}: cannot be written ({error})") from error


class IterationTimes:
    """Mean times since the last log line, for the line that TIPC reads."""

    def __init__(self) -> None:
        self._reset()
        self._mark = time.perf_counter()

    def _reset(self) -> None:
        self._reader = self._batch = 0.0
        self._iterations = self._samples = 0

    def batch_read(self) -> None:
        """The batch is in hand: what passed since the last step was waiting for it."""
        self._reader += time.perf_counter() - self._mark

    def step_done(self, samples: int) -> None:
        """One iteration is over."""
        now = time.perf_counter()
        self._batch += now - self._mark
        self._mark = now
        self._iterations += 1
        self._samples += samples

    def summary(self) -> str:
        """The means as TIPC's log line has them; starts anew."""
        n = max(self._iterations, 1)
        samples, batch = self._samples / n, self._batch / n
        text = (
            f"avg_reader_cost: {self._reader / n:.5f} sec - avg_batch_cost: {batch:.5f} sec - "
            f"avg_samples: {samples:g} - avg_ips: {samples / batch if batch else 0:.5f} images/sec"
        )
        self._reset()
        return text
