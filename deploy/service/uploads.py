"""What a request says: the picture file and the options, as a form or as JSON, read within bounds."""

import asyncio
import base64
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

RETRY_AFTER = "1"  # seconds; by then some of what is in the way is answered
PICTURE = "the picture file: PNG, JPEG, BMP, TIFF or WebP, and no animated WebP"
LONGEST_FIELD = 4096  # bytes of a form's field; with some charsets decoding takes time that grows with their square


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and all of them together."""

    upload_bytes: int = 10 * 2**20  # of the whole body of a request
    held_bytes: int = 256 * 2**20  # of all bodies that are coming or waiting to be decoded
    upload_seconds: float = 30.0  # that a body may take to come
    pixels: int = 32_000_000  # of a picture; its header tells before it is decoded
    decode_seconds: int = 10  # that a picture may take

    @property
    def decoder_bytes(self) -> int:
        """What a picture may take in its decoder: RGBA, its RGB, and that as bytes twice are 14 bytes a pixel.

        A WebP is drawn on two canvases and handed over as bytes first: 22 bytes a pixel were measured.
        """
        return 24 * self.pixels + 10 * self.upload_bytes + 100 * 2**20


# Scores end at 1: above a larger threshold nothing would ever be.
Share = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """What a request may say besides the picture."""

    model_config = ConfigDict(extra="forbid")

    image_threshold: Share = Field(None, description="the picture is an anomaly above it; by default the model's own")
    pixel_threshold: Share = Field(None, description="a pixel is anomalous above it; by default the model's own")
    min_area: int | None = Field(
        None, ge=0, description="regions of fewer pixels of the picture are left out; by default the model's own"
    )
    map: bool = Field(False, description="true: answer the anomaly map too")
    map_size: Literal["model", "original"] = Field(
        "model", description="of the map: the model's input size, or original: that of the picture, upright"
    )


class JsonRequest(Options):
    """A picture and options as JSON."""

    image: str = Field(description=f"{PICTURE}, in base64")


# One address takes either kind of body, which FastAPI cannot tell from a signature.
OPTIONS_SCHEMA = Options.model_json_schema()
FORM_SCHEMA = {
    **OPTIONS_SCHEMA,
    "title": "FormRequest",
    "properties": {
        "image": {"type": "string", "format": "binary", "description": PICTURE},
        **OPTIONS_SCHEMA["properties"],
    },
    "required": ["image"],
}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM_SCHEMA},
        "application/json": {"schema": JsonRequest.model_json_schema()},
    },
}


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> HTTPException:
    """The error to raise: one line; it is cut, since it may quote what came from outside."""
    return HTTPException(status, " ".join(text.split())[:500], headers)


def busy() -> HTTPException:
    """The error of whoever comes while there is no room."""
    return problem(503, "busy; come again", {"Retry-After": RETRY_AFTER})


@dataclass(eq=False)
class _Upload:
    """A body on its way, or waiting to be decoded."""

    deadline: asyncio.Timeout
    held: int = 0  # bytes


Reader = Callable[[Request], Awaitable[tuple[bytes, Options]]]


class Uploads:
    """Reads bodies, of which it holds a bounded number of bytes at a time, in memory only.

    Where a body finds no room, the oldest of those that are still coming gives way. So whoever fills the room and then
    sends nothing keeps nobody out.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0
        self._coming: dict[_Upload, None] = {}  # the oldest first

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[tuple[bytes, Options]]:
        """The picture file and the options in a request's body, whose bytes count as held until the block ends.

        Raises:
            HTTPException: 400, 408, 413, 415, 422 or 503.
        """
        kinds = {"multipart/form-data": read_form, "application/json": read_json}
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in kinds:
            raise problem(415, f"Content-Type must be {' or '.join(kinds)}, not {kind or 'empty'}")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.upload_bytes:
            raise self._too_large()
        upload = _Upload(asyncio.timeout(self._limits.upload_seconds))
        try:
            yield await self._receive(request, kinds[kind], upload)
        finally:
            self._held -= upload.held

    async def _receive(self, request: Request, read: Reader, upload: _Upload) -> tuple[bytes, Options]:
        self._coming[upload] = None
        try:
            async with upload.deadline:
                return await read(Request(request.scope, self._counted(request.receive, upload)))
        except TimeoutError as error:
            if upload not in self._coming:
                raise busy() from error
            raise problem(408, f"the upload took more than {self._limits.upload_seconds:g} seconds") from error
        except ClientDisconnect as error:  # nobody will read it, but it is counted
            raise problem(400, "the upload was broken off") from error
        finally:
            self._coming.pop(upload, None)

    def _counted(self, receive: Receive, upload: _Upload) -> Receive:
        """`receive`, which raises as soon as the body is too large, whatever length the client has announced."""

        async def receive_counted() -> Message:
            message = await receive()
            length = len(message.get("body", b""))
            if upload.held + length > self._limits.upload_bytes:
                raise self._too_large()
            self._make_room(length, upload)
            upload.held += length
            self._held += length
            if not message.get("more_body"):
                self._coming.pop(upload, None)
            return message

        return receive_counted

    def _make_room(self, length: int, upload: _Upload) -> None:
        while self._held + length > self._limits.held_bytes:
            oldest = next(iter(self._coming), upload)
            if oldest is upload:
                raise busy()
            del self._coming[oldest]
            if not oldest.deadline.expired():
                oldest.deadline.reschedule(0)  # at once
            self._held -= oldest.held
            oldest.held = 0

    def _too_large(self) -> HTTPException:
        return problem(
            413, f"the upload is larger than {self._limits.upload_bytes / 2**20:g} MB; scale the picture down"
        )


async def read_form(request: Request) -> tuple[bytes, Options]:
    """A multipart form with the file `image` and the options as fields.

    Raises:
        HTTPException: 400 or 422.
    """
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=len(Options.model_fields) + 1,
        max_part_size=LONGEST_FIELD,
    )
    parser.spool_max_size = sys.maxsize  # in memory, whose bounds are kept above: the disk may be full or read-only
    try:
        fields = dict(await parser.parse())
        image = fields.pop("image", None)
        content = await image.read() if isinstance(image, UploadFile) else None
    except (HTTPException, ClientDisconnect):
        raise
    except Exception as error:  # the form's reader raises many kinds on what is no form
        raise problem(400, f"the form cannot be read ({error})") from error
    if content is None:
        raise problem(422, "image: a file is needed in this field of the form")
    if re.search(r"[/\\\x00-\x1f]", image.filename) or image.filename in (".", ".."):
        raise problem(422, "image: its file name must be a plain name, not a path")
    with validating():
        return content, Options.model_validate(fields)


async def read_json(request: Request) -> tuple[bytes, Options]:
    """JSON with the file in base64 as `image`, and the options.

    Raises:
        HTTPException: 422.
    """
    body = await request.body()

    def parse() -> tuple[bytes, Options]:
        with validating():
            options = JsonRequest.model_validate_json(body)
        try:
            return base64.b64decode(options.image, validate=True), options
        except ValueError as error:
            raise problem(422, f"image: not base64 ({error})") from error

    return await asyncio.to_thread(parse)  # ten megabytes of it would hold up everyone


@contextlib.contextmanager
def validating() -> Iterator[None]:
    """Turn what pydantic says into an error 422."""
    try:
        yield
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors())
        raise problem(422, "; ".join(faults)) from error
