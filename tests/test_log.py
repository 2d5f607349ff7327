"""Lines of a training: whole in train.log and in a pipe, fitted to a terminal."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tqdm.utils import disp_len

from utils.log import fitted

ROOT = Path(__file__).resolve().parent.parent
TIMES = "avg_reader_cost: 0.00015 sec - avg_batch_cost: 4.01234 sec - avg_samples: 32 - avg_ips: 7.97540 images/sec"
ITERATION = f"toothbrush  Epoch 100 - iter:12/12 - lr:0.001 - loss = -1.234/-1.234 (last/avg) - {TIMES}"
EPOCH = "bottle  Epoch 100 - loss = -1.234 - pixel auroc: 0.978 - image auroc: 1.000 - best epoch: 100 - 28.1 sec"
HELD_OUT = EPOCH.replace(" - pixel", " - held-out loss = -0.500 - pixel")


@pytest.mark.parametrize(
    ("columns", "line", "lines"),
    [
        (80, "bottle  trainable parameters: 1,225,750", ["bottle  trainable parameters: 1,225,750"]),
        (200, ITERATION, [ITERATION]),
        (80, ITERATION, ["toothbrush  Epoch 100 - iter:12/12 - lr:0.001 - loss = -1.234/-1.234 (last/avg)"]),
        (70, ITERATION, ["toothbrush  Epoch 100 - iter:12/12 - loss = -1.234/-1.234 (last/avg)"]),
        (80, EPOCH, ["bottle  Epoch 100 - loss = -1.234 - best epoch: 100 - 28.1 sec"]),
        (120, HELD_OUT, [HELD_OUT.replace(" - pixel auroc: 0.978 - image auroc: 1.000", "")]),
        (80, "word " * 18 + "end", ["word " * 15 + "word", "    word word end"]),
        (20, "bottle  " + "x" * 30, ["bottle ", "    " + "x" * 30]),
        (20, "瓶子瓶子  瓶子瓶子瓶子 ab", ["瓶子瓶子 ", "    瓶子瓶子瓶子 ab"]),
    ],
)
def test_a_line_fits_the_terminal(monkeypatch, columns, line, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert fitted(line).split("\n") == lines


TRAINING = """
import sys
from pathlib import Path
from tqdm.contrib.logging import logging_redirect_tqdm
from utils.log import make_logger, time_bar
logger = make_logger(Path(sys.argv[1]), silent=False)
with logging_redirect_tqdm([logger]), time_bar(10, 40, at_most=True) as bar:
    bar.set_description_str("bottle  epoch 2/4")
    for _ in range(5):
        logger.info(sys.argv[2])
        bar.mininterval = 0
        bar.update()
"""


def test_a_terminal_shows_short_lines_and_the_time_that_is_left_and_the_log_has_the_whole_lines(tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", TRAINING, tmp_path / "train.log", ITERATION]
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                text += os.read(ours, 4096)
            except OSError:  # its other end is closed
                break
    os.close(ours)
    assert process.returncode == 0, text
    lines = [line for line in re.split(r"[\r\n]+", text.decode()) if line.strip()]
    assert max(map(disp_len, lines)) <= 80
    assert any(re.fullmatch(r"bottle  epoch 2/4 \S* +\d\d:\d\d, at most \d\d:\d\d left", line) for line in lines)
    assert any(line.startswith("toothbrush  Epoch 100 - iter:12/12") for line in lines)
    assert "avg_" not in text.decode()
    assert (tmp_path / "train.log").read_text() == f"{ITERATION}\n" * 5


def test_a_pipe_gets_the_whole_lines_and_no_bar(tmp_path):
    command = [sys.executable, "-c", TRAINING, tmp_path / "train.log", ITERATION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{ITERATION}\n" * 5, "")
