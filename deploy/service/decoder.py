"""A process that decodes pictures, one after the other, for `deploy.service.decoding`, which starts it and may kill it.

A request on stdin is a line of JSON, {"bytes": ..., "input_size": [height, width], "mean": [...], "std": [...],
"white_level": ... or null}, and so many bytes of a picture file. The answer on stdout is a line of JSON, {"error": "one
line"}, or that of a picture, {"size": [height, width], "orientation": ..., "odd": what is wrong with its white, or
null}, and the float32 of (3, height, width). The end of stdin ends the process.
"""

import faulthandler
import io
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run as a script: the folder above deploy/

from PIL import ExifTags, Image

from deploy.common.cli import UserError
from deploy.common.imaging import FORMATS, FULL_WHITE, decode, odd_white, preprocess, to_rgb


def main() -> None:
    """Arguments: the most pixels of a picture, seconds after which the process ends itself, bytes it may take."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to a whole group of processes; the service ends this one
        signal.signal(number, signal.SIG_IGN)
    silence()
    max_pixels, seconds, memory = map(int, sys.argv[1:])
    limit_memory(memory)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request = json.loads(line)
        content = io.BytesIO(requests.read(request["bytes"]))
        # A thread that ends the process, with no need of Python, whatever C code it is in.
        faulthandler.dump_traceback_later(seconds, file=2, exit=True)
        answer, data = answer_to(content, max_pixels, request)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.write(data)
        answers.flush()


def answer_to(content: BinaryIO, max_pixels: int, request: dict[str, Any]) -> tuple[dict[str, Any], bytes | memoryview]:
    """The line and the bytes of the answer."""
    try:
        array = decode(Path("image"), content, max_pixels)
    except UserError as error:
        return {"error": str(error)}, b""
    told = {
        "size": array.shape[:2],
        "orientation": orientation(content),
        "odd": odd_white(array, request["white_level"]),
    }
    picture = to_rgb(array, request["white_level"] or FULL_WHITE)
    return told, preprocess(picture, *request["input_size"], request["mean"], request["std"]).data


def orientation(content: BinaryIO) -> int:
    """How the pixels lie in the file, as EXIF counts it from 1 to 8; `decode` has turned them by that."""
    with Image.open(content, formats=FORMATS) as image:
        said = image.getexif().get(ExifTags.Base.Orientation)
    return int(said) if said in range(1, 9) else 1


def silence() -> None:
    """Drop what Pillow warns of and what libtiff and others write to stderr: anyone can send odd metadata."""
    warnings.simplefilter("ignore")
    sys.stderr = os.fdopen(os.dup(2), "w")  # Python itself still says what fails
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def limit_memory(beyond: int) -> None:
    """Let allocations fail that would take so many bytes more than the process has now; where /proc tells (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data and stack
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the service has ended without this answer
        os._exit(1)
