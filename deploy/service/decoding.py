"""Decoding in processes that can be killed.

A thread cannot: it goes on with a picture that nobody wants any more, holds up the others and the end of the service,
takes what memory it likes, and a fault in C code ends all. A process takes 20 MB, 0.1 s of CPU time at its start, and
1 ms more for a picture (4.2 instead of 3.3 ms for one of 256x256, measured on two cores), since bytes go to and fro.
"""

import asyncio
import contextlib
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.common.cli import UserError, warn
from deploy.service.uploads import Limits

GRACE = 0.2  # seconds that a decoder gets whose client is gone: a new one costs 0.1 s of CPU time


@dataclass(frozen=True)
class Decoded:
    """A picture."""

    item: np.ndarray  # (3, H, W) float32, what the model takes
    size: tuple[int, int]  # height and width in pixels, upright
    orientation: int  # of the file's pixels, 1 to 8 as EXIF counts it
    odd: str | None  # what is wrong with its white, see `odd_white`


class Decoders:
    """Processes that decode pictures, each one picture at a time; further pictures wait for their turn."""

    def __init__(self, count: int, limits: Limits) -> None:
        """
        Args:
            count: the most processes; they are started when they are needed and kept.
            limits: of a picture.
        """
        self._command = command(limits)
        self._seconds = limits.decode_seconds
        self._turns = asyncio.Semaphore(count)
        self._idle: list[Process] = []
        self._warned: set[int | None] = set()  # white levels that pictures did not keep to

    async def start(self) -> None:
        """Have one process ready, so that the first picture need not wait for its start."""
        self._idle.append(await self._free())

    async def close(self) -> None:
        """End the processes that wait for work."""
        for decoder in self._idle:
            decoder.stdin.close()
            await decoder.wait()

    async def decode(self, content: bytes, description: Mapping[str, Any]) -> Decoded:
        """A picture file -> the picture, for the model of this description.

        Whoever cancels it has the process killed soon, be it in C code: nobody waits for a picture that nobody wants.

        Raises:
            UserError: it cannot be decoded, or not within the limits.
        """
        async with self._turns:
            decoder = await self._free()
            begun = time.monotonic()
            work = asyncio.ensure_future(ask(decoder, content, description))
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work], timeout=GRACE)
                raise
            except (EOFError, OSError) as error:
                late = time.monotonic() - begun >= self._seconds
                reason = f"takes more than {self._seconds} seconds to decode" if late else "makes its decoder fail"
                raise UserError(f"image: {reason}; save it in another format") from error
            finally:
                if work.done() and work.exception() is None:
                    self._idle.append(decoder)
                else:
                    work.cancel()
                    with contextlib.suppress(ProcessLookupError):
                        decoder.kill()
        if isinstance(answer, str):
            raise UserError(answer)
        if answer.odd and description["white_level"] not in self._warned:
            self._warned.add(description["white_level"])
            warn(f"a picture sent to {description['category']} {answer.odd}; later ones like it are not named")
        return answer

    async def _free(self) -> Process:
        while self._idle:
            decoder = self._idle.pop()
            if decoder.returncode is None:
                return decoder
        return await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, limit=2**20)


def command(limits: Limits) -> list[str]:
    """What starts a decoder."""
    script = Path(__file__).resolve().parent / "decoder.py"
    return [sys.executable, str(script), *map(str, (limits.pixels, limits.decode_seconds, limits.decoder_bytes))]


async def ask(decoder: Process, content: bytes, description: Mapping[str, Any]) -> Decoded | str:
    """What the process makes of a picture file: the picture, or what is wrong with the file.

    Raises:
        EOFError, OSError: it has ended.
    """
    request = {key: description[key] for key in ("input_size", "mean", "std", "white_level")} | {"bytes": len(content)}
    decoder.stdin.writelines([json.dumps(request).encode(), b"\n", content])
    await decoder.stdin.drain()
    line = await decoder.stdout.readline()
    if not line:
        raise EOFError
    answer = json.loads(line)
    if "error" in answer:
        return answer["error"]
    height, width = description["input_size"]
    data = await decoder.stdout.readexactly(3 * height * width * 4)
    item = np.frombuffer(data, np.float32).reshape(3, height, width)
    return Decoded(item, tuple(answer["size"]), answer["orientation"], answer["odd"])
