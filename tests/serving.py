"""What the tests of the service and of its page share: the process, and uploads that no service should trust."""

import io
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PREDICT = "/v1/models/bottle:predict"
MB = 2**20


def picture_file(brightness=255, size=(40, 30), file_format="PNG", **options):
    """A grey picture, as the bytes of a file."""
    file = io.BytesIO()
    Image.new("RGB", size, (brightness,) * 3).save(file, file_format, **options)
    return file.getvalue()


def png_that_claims(width, height):
    """The start of a PNG whose header claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def hostile_uploads():
    """Name of the trouble -> file name, content, status."""
    whole = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    noise = io.BytesIO()
    Image.fromarray(whole).save(noise, "PNG")
    frames = [Image.new("P", (8, 8), colour) for colour in range(3)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    webp = io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    tiff = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tiff, "TIFF")
    strange = io.BytesIO()
    Image.new("RGB", (8, 8)).save(strange, "TIFF")
    # The tag of where the pixels are says that it is a fraction; Pillow raises a TypeError then.
    fraction = re.sub(b"\x11\x01[\x03\x04]\x00", b"\x11\x01\x05\x00", strange.getvalue())
    return {
        "empty": ("empty.png", b"", 422),
        "truncated": ("cut.png", noise.getvalue()[: len(noise.getvalue()) // 2], 422),
        "truncated header": ("cut.png", noise.getvalue()[:20], 422),
        "30000x30000": ("bomb.png", png_that_claims(30000, 30000), 422),
        "too many pixels": ("big.png", png_that_claims(8000, 8000), 422),
        "no pixels": ("none.png", png_that_claims(0, 5), 422),
        "text": ("text.png", b"no picture at all\n" * 50, 422),
        "program": ("picture.jpg", b"\x7fELF" + bytes(500), 422),
        "svg": ("picture.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
        "animated gif": ("move.gif", gif.getvalue(), 422),
        "gif called png": ("move.png", gif.getvalue(), 422),
        "animated webp": ("move.webp", webp.getvalue(), 422),
        "floating point": ("float.tiff", tiff.getvalue(), 422),
        "offset of pixels is a fraction": ("fraction.tiff", fraction, 422),
        "20 MB": ("large.png", bytes(20 * MB), 413),
        "path": ("../../etc/passwd", picture_file(), 422),
        "absolute path": ("/tmp/picture.png", picture_file(), 422),
        "windows path": ("..\\..\\picture.png", picture_file(), 422),
        "dots": ("..", picture_file(), 422),
    }


HOSTILE = hostile_uploads()


class Process:
    """deploy/serve.py on a free port."""

    def __init__(self, *options, deploy=ROOT / "deploy", before=()):
        command = [*before, sys.executable, deploy / "serve.py", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.line = self.process.stdout.readline()
        if not self.line:
            pytest.fail(self.process.communicate()[1])
        self.url = re.search(r"http://\S+", self.line)[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def end(self):
        """Ask it to end; return its exit code and what it has said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30), self.process.stderr.read()
