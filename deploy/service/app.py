"""The HTTP service: pictures in, scores out. Models come as queues of arrays; no framework is imported here.

Every error is JSON, `{"detail": "one clear line"}`. A bad upload is never the server's fault: what the form, the JSON
or the picture's reader chokes on is a 4xx.
"""

import asyncio
import base64
import contextlib
import io
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import prometheus_client
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from deploy.common.cli import UserError
from deploy.common.imaging import label, preprocess, read_rgb
from deploy.common.runtime import available_cores
from deploy.service.batching import Answer, Batcher, Full

PAGE = Path(__file__).resolve().parent / "page"
RETRY_AFTER = "1"  # seconds; by then some of what filled the queue is answered


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    upload_bytes: int = 10 * 2**20  # of the whole body of a request
    pixels: int = 32_000_000  # of a picture; its header tells before it is decoded
    upload_seconds: float = 30.0  # a slower client gives its place in the queue to others


@dataclass(frozen=True)
class ServedModel:
    """A model behind its queue."""

    description: Mapping[str, Any]  # of inference.yml
    batcher: Batcher  # of its `run`: anomaly map, smoothed map, image score


# ---- what goes in and out


class Options(BaseModel):
    """What a request may say besides the picture."""

    model_config = ConfigDict(extra="forbid")

    image_threshold: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="the picture is an anomaly above it; by default the model's own"
    )
    pixel_threshold: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="a pixel is anomalous above it; by default the model's own"
    )
    map: bool = Field(False, description="true: answer the anomaly map too")


class JsonRequest(Options):
    """A picture and options as JSON."""

    image: str = Field(description="the picture file, in base64")


class Milliseconds(BaseModel):
    """Where the time went."""

    upload: float = Field(description="reading the request's body")
    preprocess: float = Field(description="decoding, resizing, normalising")
    queue: float = Field(description="waiting for the model, and for others to join the batch")
    inference: float = Field(description="the run of the whole batch")
    total: float = Field(description="from the request's headers to its answer")


class Prediction(BaseModel):
    """What the model says of a picture."""

    model: str
    score: float = Field(description="image score, from 0 to 1")
    label: str = Field(description="Anomaly if the score is above image_threshold, else Normal")
    image_threshold: float
    pixel_threshold: float
    anomalous_share: float = Field(description="share of the map's pixels above pixel_threshold, from 0 to 1")
    map: str | None = Field(
        description="the smoothed anomaly map as a grey 8-bit PNG in base64, 0 to 255 for 0 to 1, of the model's "
        "input size: stretch it over the picture; null if it was not asked for"
    )
    batch_size: int = Field(description="how many pictures went through the model together")
    time_ms: Milliseconds


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    category: str
    input_size: list[int] = Field(description="height and width that pictures are resized to")
    image_threshold: float
    pixel_threshold: float


class ModelList(BaseModel):
    """The models that are served."""

    models: list[ModelInfo]


class Problem(BaseModel):
    """An error."""

    detail: str


PROBLEMS = {
    400: "the body cannot be read",
    404: "no such model",
    408: "the upload took too long",
    413: "the upload is too large",
    415: "the body is neither a form nor JSON",
    422: "not a picture, too many pixels, or a wrong option",
    503: "busy; come again after Retry-After seconds",
}
# One address takes either kind of body, which FastAPI cannot tell from a signature.
OPTIONS_SCHEMA = Options.model_json_schema()
FORM_SCHEMA = {
    **OPTIONS_SCHEMA,
    "title": "FormRequest",
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "the picture file"},
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


# ---- reading uploads


async def read_upload(request: Request, limits: Limits) -> tuple[bytes, Options]:
    """The picture file and the options in a request's body.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422.
    """
    kinds = {"multipart/form-data": read_form, "application/json": read_json}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise problem(415, f"Content-Type must be {' or '.join(kinds)}, not {kind or 'empty'}")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.upload_bytes:
        raise too_large(limits)
    try:
        async with asyncio.timeout(limits.upload_seconds):
            return await kinds[kind](Request(request.scope, limited(request.receive, limits)))
    except TimeoutError as error:
        raise problem(408, f"the upload took more than {limits.upload_seconds:g} seconds") from error
    except ClientDisconnect as error:  # nobody will read it, but it is counted
        raise problem(400, "the upload was broken off") from error


def too_large(limits: Limits) -> HTTPException:
    """The error of a body beyond the limit."""
    return problem(413, f"the upload is larger than {limits.upload_bytes / 2**20:g} MB; scale the picture down")


def limited(receive: Receive, limits: Limits) -> Receive:
    """`receive`, which raises as soon as the body is too large, whatever length the client has announced."""
    taken = 0

    async def receive_limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limits.upload_bytes:
            raise too_large(limits)
        return message

    return receive_limited


async def read_form(request: Request) -> tuple[bytes, Options]:
    """A multipart form with the file `image` and the options as fields.

    Raises:
        HTTPException: 400 or 422.
    """
    try:
        async with request.form(max_files=1, max_fields=len(Options.model_fields) + 1) as form:
            fields = dict(form)
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


# ---- between uploads and the model


def decode(content: bytes, description: Mapping[str, Any], max_pixels: int) -> np.ndarray:
    """A picture file -> (3, H, W) float32, what the model takes.

    Raises:
        HTTPException: 422.
    """
    try:
        picture = read_rgb(Path("image"), io.BytesIO(content), max_pixels)
    except UserError as error:
        raise problem(422, str(error)) from error
    return preprocess(picture, *description["input_size"], description["mean"], description["std"])[0]


def encode_map(anomaly_map: np.ndarray) -> str:
    """(H, W) float in [0, 1] -> grey 8-bit PNG in base64."""
    grey = np.uint8(np.round(np.clip(anomaly_map, 0, 1) * 255))
    return base64.b64encode(cv2.imencode(".png", grey)[1]).decode()


class Metrics:
    """What Prometheus reads of the service and its process."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        common: dict[str, Any] = {"labelnames": ["model"], "registry": self.registry}
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests = prometheus_client.Counter("fastflow_requests", "Predictions asked for", **common)
        self._errors = prometheus_client.Counter(
            "fastflow_errors", "Predictions refused or failed", ["model", "status"], registry=self.registry
        )
        self._seconds = prometheus_client.Histogram(
            "fastflow_request_seconds", "From a request's headers to its answer or error", **common
        )
        self.batch_size = prometheus_client.Histogram(
            "fastflow_batch_size", "Pictures in the batch of each picture", buckets=(1, 2, 4, 8, 16, 32), **common
        )
        taken = prometheus_client.Gauge("fastflow_pictures_in_progress", "Places taken in the queue", **common)
        for name, model in models.items():
            taken.labels(name).set_function(lambda batcher=model.batcher: batcher.taken)

    @contextlib.contextmanager
    def watch(self, model: str) -> Iterator[None]:
        """Count a request, its time, and the error that ends it."""
        begun = time.perf_counter()
        self._requests.labels(model).inc()
        try:
            yield
        except Exception as error:
            status = error.status_code if isinstance(error, HTTPException) else 500
            self._errors.labels(model, status).inc()
            raise
        finally:
            self._seconds.labels(model).observe(time.perf_counter() - begun)


# ---- the application


def create_app(models: Mapping[str, ServedModel], limits: Limits) -> FastAPI:
    """The service as an ASGI application. When it shuts down it closes the models' queues.

    Args:
        models: by the name in their address.
        limits: what a request may ask for.
    """
    metrics = Metrics(models)
    decoders = ThreadPoolExecutor(available_cores(), "decoder")  # few: a large picture takes much memory

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models.values():
            await asyncio.to_thread(model.batcher.close)
        decoders.shutdown()

    app = FastAPIOffline(title="FastFlow", version="1", lifespan=lifespan, redoc_url=None)

    @app.exception_handler(Exception)
    async def server_error(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"detail": "the server failed; its log says why"}, 500)

    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", summary="Whether every model takes pictures", responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        stopped = [name for name, model in models.items() if not model.batcher.alive]
        if stopped:
            raise problem(503, f"stopped: {', '.join(stopped)}")
        return {"status": "ready"}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def figures() -> Response:
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/v1/models", summary="The models that are served")
    async def list_models() -> ModelList:
        return ModelList(models=[ModelInfo(**{**model.description, "name": name}) for name, model in models.items()])

    @app.post(
        "/v1/models/{name}:predict",
        summary="Score a picture",
        responses={status: {"model": Problem, "description": text} for status, text in PROBLEMS.items()},
        openapi_extra={"requestBody": BODY},
    )
    async def predict(name: str, request: Request) -> Prediction:
        # Prometheus keeps every label for ever, so names that clients make up share one.
        with metrics.watch(name if name in models else "unknown"):
            if name not in models:
                raise problem(404, f"no model {name}; there are: {', '.join(models)}")
            try:
                with models[name].batcher.place() as hand_in:
                    return await score(name, request, hand_in)
            except Full:
                raise problem(503, "busy; come again", {"Retry-After": RETRY_AFTER}) from None

    async def score(name: str, request: Request, hand_in: Callable[[np.ndarray], Future[Answer]]) -> Prediction:
        description = models[name].description
        begun = time.perf_counter()
        content, options = await read_upload(request, limits)
        received = time.perf_counter()
        loop = asyncio.get_running_loop()
        item = await loop.run_in_executor(decoders, decode, content, description, limits.pixels)
        decoded = time.perf_counter()
        answer = await asyncio.wrap_future(hand_in(item))
        metrics.batch_size.labels(name).observe(answer.batch_size)
        _, smoothed, image_score = answer.outputs  # (1, H, W), (1, H, W), ()
        image_threshold = description["image_threshold"] if options.image_threshold is None else options.image_threshold
        pixel_threshold = description["pixel_threshold"] if options.pixel_threshold is None else options.pixel_threshold
        seconds = {
            "upload": received - begun,
            "preprocess": decoded - received,
            "queue": answer.waited,
            "inference": answer.ran,
            "total": time.perf_counter() - begun,
        }
        return Prediction(
            model=name,
            score=float(image_score),
            label=label(float(image_score), image_threshold),
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
            anomalous_share=float(np.mean(smoothed > pixel_threshold)),
            map=encode_map(smoothed[0]) if options.map else None,
            batch_size=answer.batch_size,
            time_ms=Milliseconds(**{what: 1000 * value for what, value in seconds.items()}),
        )

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app
