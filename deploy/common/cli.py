"""What every command shares: one clear line for bad input, typed options."""

import argparse
import errno
import math
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an OSError says of it
LARGEST_SIDE = 4096  # of a model's pictures, in pixels: beyond it memory ends, not sense
NO_PADDLE = (
    "pip install -r requirements.txt (PyPI has it for Linux and Windows on x86-64 and for macOS on ARM; elsewhere "
    "deploy/infer.py and deploy/serve.py run with --backend onnxruntime or openvino)"
)


class UserError(Exception):
    """Bad input. The message names the file or option, what is wrong and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line on stderr instead of the whole usage text."""

    def error(self, message: str) -> None:
        files = [word for word in sys.argv[1:] if word.startswith("-") and os.path.isfile(word)]  # of a pattern, say
        advice = f"{files[0]} is a file: write ./{files[0]}" if files else f"see {self.prog} --help"
        self.exit(2, f"error: {printable(f'{self.prog}: {message} ({advice})')}\n")


def add_pictures(parser: argparse.ArgumentParser, thresholds: str, image_path: str | None = None) -> None:
    """Add --image_path, a list of one or more, both thresholds, --min_area, and what to write beside the drawings.

    Args:
        parser: of a command that scores pictures.
        thresholds: tells which ones hold where the options are left out.
        image_path: the picture where none is named, the list is None then; None: one must be.
    """
    pictures = f"pictures, folders, patterns, one or more{f' ({image_path})' if image_path else ''}"
    parser.add_argument(
        "--image_path", nargs="+", action="extend", metavar="PATH", required=not image_path, help=pictures
    )
    for name, what in (("image", "a picture is an anomaly above it"), ("pixel", "a pixel is in the mask above it")):
        parser.add_argument(f"--{name}_threshold", type=finite_float, help=f"{what} ({thresholds})")
    add_min_area(parser, thresholds)
    parser.add_argument("--save_json", metavar="FILE", help="write the results here, a line of JSON per picture")
    parser.add_argument(
        "--save_maps",
        choices=("png", "npy", "tiff"),
        help="write the anomaly maps, as large as the pictures, to maps/ in the folder of the drawings; png: 16 bit, "
        "0 to 65535 for 0 to 1; npy, tiff: float32",
    )
    parser.add_argument("--save_masks", action="store_true", help="write the regions to masks/ there: PNG, 0 and 255")


def add_min_area(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --min_area; `default` tells what holds where it is left out."""
    parser.add_argument(
        "--min_area",
        type=non_negative_int,
        metavar="PIXELS",
        help=f"regions above the pixel threshold of fewer pixels of the picture are left out ({default})",
    )


def boolean(text: str) -> bool:
    """Type of options that take True or False, also in the other words that the published scripts take."""
    if text.lower() in ("true", "t", "yes", "y", "1", "gpu"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0", "cpu"):
        return False
    raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")


def positive_int(text: str) -> int:
    """Type of options that take a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def interval(text: str) -> int:
    """Type of options that take a whole number from 1, or -1 for never."""
    return -1 if text == "-1" else positive_int(text)


def finite_float(text: str) -> float:
    """Type of options that take any number."""
    return _number(text, math.isfinite, "a number")


def non_negative_float(text: str) -> float:
    """Type of options that take a number from 0."""
    return _number(text, lambda value: 0 <= value < math.inf, "a number from 0")


def share(text: str) -> float:
    """Type of options that take a number between 0 and 1, neither of them included."""
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def _number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
    return value


def non_negative_int(text: str) -> int:
    """Type of options that take a whole number from 0."""
    return 0 if text == "0" else positive_int(text)


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would obey: names in files are anyone's."""
    return escaped(" ".join(text.split()))


def escaped(name: str) -> str:
    """The name of a file with escapes for what a terminal would obey, line breaks too; blanks of any width stay."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in name)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def report_error(error: Exception) -> None:
    """One line on stderr, whatever line breaks the message has."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None], packages: str = "-r requirements.txt", end_at_once: bool = False) -> None:
    """Call a script's `main` and end the process with its exit code; bad input is one line and code 2.

    SIGTERM is to `main` what Ctrl-C is, a KeyboardInterrupt, so that nothing half-written is left; it ends with code
    143 and without a word. After Ctrl-C each text that the KeyboardInterrupt carries is a line; `main` may raise its
    own.

    Args:
        main: the script; it imports within itself what may not be installed.
        packages: what to give to pip where a module is not installed.
        end_at_once: after success, leave out what Python and libraries do at the end of a process; with Paddle that
            takes 0.6 s. For a script that has nothing to clean up.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it; the next file would take its place
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Chinese shows ? in its place
    terminated = -math.inf  # when, by time.monotonic()

    def terminate(*_: object) -> None:
        nonlocal terminated
        before, terminated = terminated, time.monotonic()
        if terminated - before > 1:  # `timeout` sends two at once
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = main() or 0
        sys.stdout.flush()
        if end_at_once:
            os._exit(code)
    except BaseException as error:
        code = _report(_interrupt_behind(error), packages) if terminated == -math.inf else 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)


def _interrupt_behind(error: BaseException) -> BaseException:
    """The KeyboardInterrupt that another error was made of, as in the midst of an import; else the error itself."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _report(error: BaseException, packages: str) -> int:
    """Say in one line what ended a script, and return the exit code; raise what nobody has thought of."""
    try:
        raise error
    except UserError:
        report_error(error)
    except ModuleNotFoundError:
        advice = NO_PADDLE if error.name == "paddle" else f"pip install {packages}"
        report_error(Exception(f"Python has no module {error.name} here; {advice}"))
    except BrokenPipeError:  # whoever read the output has seen enough
        _silence()
        return 1
    except OSError:
        if error.filename is not None:  # a name that is too long, a folder that may not be read
            report_error(Exception(f"{error.filename}: {error.strerror}"))
        elif error.errno in DISK_FULL:
            report_error(Exception(f"the output cannot be written ({error.strerror}); make room on its disk"))
            _silence()
        else:
            raise
    except KeyboardInterrupt:
        report_error(Exception("interrupted"))
        for line in error.args:  # how to go on
            print(line, file=sys.stderr)
        return 128 + signal.SIGINT
    return 2


def _silence() -> None:
    """Drop what Python would still write to stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
