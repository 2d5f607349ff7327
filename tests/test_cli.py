"""Types of options, and the device that a command is asked for."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.common import runtime
from deploy.common.cli import ArgumentParser, add_pictures, boolean, finite_float, interval, run_main
from utils import options

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "y", "t", "T", "gpu", "GPU"])
def test_words_for_true(text):
    assert boolean(text) is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no", "n", "f", "F", "cpu"])
def test_words_for_false(text):
    assert boolean(text) is False


@pytest.mark.parametrize("text", ["", "2", "gpu:0", "None"])
def test_other_words_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be True or False"):
        boolean(text)


def test_thresholds_may_be_negative():
    """Above such a threshold are all scores, so everything is an anomaly; published scripts take it."""
    parser = ArgumentParser()
    add_pictures(parser, "0.8")
    args = parser.parse_args(["--image_path", "a.png", "--image_threshold", "-0.5", "--pixel_threshold=-1e-3"])
    assert (args.image_threshold, args.pixel_threshold) == (-0.5, -0.001)
    for text in ("nan", "inf", "high"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number"):
            finite_float(text)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["--image_path", "a.png", "b.png", "--device", "cpu"], ["a.png", "b.png"]),
        (["--image_path=a.png", "--image_path", "folder", "*.png"], ["a.png", "folder", "*.png"]),
        ([], None),
    ],
)
def test_pictures_are_a_list(words, paths):
    """As a shell hands over an unquoted pattern."""
    parser = options.common_parser("")
    add_pictures(parser, "0.8", image_path="example.png")
    assert parser.parse_args(words).image_path == paths


def test_a_command_that_needs_pictures_says_so(capsys):
    parser = ArgumentParser(prog="predict.py")
    add_pictures(parser, "0.8")
    for words in ([], ["--image_path"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        assert end.value.code == 2
        assert "--image_path" in capsys.readouterr().err


def test_what_an_interruption_says_follows_it(capsys):
    def main():
        raise KeyboardInterrupt("go on with", "python 'a  b.py'")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)
    assert (end.value.code, capsys.readouterr().err) == (130, "error: interrupted\ngo on with\npython 'a  b.py'\n")


def test_an_interruption_of_an_import_is_one_too(capsys):
    def main():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("initialization failed") from interrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_main(main)
    signal.signal(signal.SIGTERM, before)
    assert (end.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_ends_no_command(closed):
    code = (
        "import sys; from deploy.common.cli import run_main, warn; run_main(lambda: warn(str(sys.stdout.write('1'))))"
    )
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)


def test_a_file_that_looks_like_an_option_is_told(tmp_path, monkeypatch, capsys):
    parser = ArgumentParser(prog="predict.py")
    add_pictures(parser, "0.8")
    (tmp_path / "-x.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["predict.py", "--image_path", "-x.png", "a.png"])
    with pytest.raises(SystemExit):
        parser.parse_args()
    assert "-x.png is a file: write ./-x.png" in capsys.readouterr().err


def test_an_interval_may_be_never():
    assert (interval("-1"), interval("3")) == (-1, 3)
    for text in ("0", "-2", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            interval(text)


@pytest.mark.parametrize(
    ("words", "chosen", "warned"),
    [
        ([], "auto", False),
        (["--cuda", "True"], "auto", True),
        (["--cuda", "False"], "cpu", False),
        (["--cuda", "False", "--device", "gpu:1"], "gpu:1", False),
    ],
)
def test_cuda_names_the_device_in_the_published_way(monkeypatch, capsys, words, chosen, warned):
    """On a machine without a GPU, which `auto` is the CPU of."""
    asked = []
    monkeypatch.setattr(runtime, "import_paddle", lambda *_: None)
    monkeypatch.setattr(runtime, "select_device", lambda name: asked.append(name) or name.replace("auto", "cpu"))
    parser = options.common_parser("")
    options.add_cuda(parser)
    options.prepare(parser.parse_args(words))
    assert asked == [chosen]
    said = capsys.readouterr().err
    assert said == ("warning: --cuda True: Paddle sees no GPU here; running on the CPU\n" if warned else "")


def test_only_commands_that_train_have_a_config_where_none_is_named():
    parsers = [options.common_parser("", of_checkpoint=whether) for whether in (False, True)]
    assert [parser.parse_args([]).config for parser in parsers] == ["./configs/resnet18.yaml", None]
    assert options.own_overrides(parsers[1].parse_args(["-o", "a=1", "-o", "b=2"])) == ["a=1", "b=2"]
    assert options.own_overrides(parsers[1].parse_args(["-cfg", "x.yaml", "-o", "a=1"])) is None


def test_bottle_is_the_category_that_nobody_names():
    parser = options.common_parser("")
    options.add_category(parser, "a category")
    assert parser.parse_args([]).category == "bottle"
