"""The HTTP service: pictures in, scores out. Models come as queues of arrays; no framework is imported here.

Every error is JSON, `{"detail": "one clear line"}`. A bad upload is never the server's fault: what the form, the JSON
or the picture's reader chokes on is a 4xx.
"""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import prometheus_client
from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.common.cli import UserError
from deploy.common.decisions import Result, Thresholds
from deploy.common.imaging import png
from deploy.common.runtime import available_cores
from deploy.service.batching import Answer, Batcher, Full
from deploy.service.decoding import Decoded, Decoders
from deploy.service.uploads import BODY, Limits, Options, Uploads, busy, problem

SCORE_BUCKETS = [*(n / 20 for n in range(1, 20)), 0.975, 0.99, 1]
HEADERS = ("X-Score", "X-Label")  # of a map as bytes
PAGE = Path(__file__).resolve().parent / "page"
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class ServedModel:
    """A model behind its queue."""

    description: Mapping[str, Any]  # of inference.yml
    batcher: Batcher  # of its `run`: anomaly map, smoothed map, image score

    @property
    def thresholds(self) -> Thresholds:
        """What decides where a request says nothing else."""
        return Thresholds.of(self.description)


# ---- what goes in and out


class Milliseconds(BaseModel):
    """Where the time went."""

    upload: float = Field(description="reading the request's body")
    preprocess: float = Field(description="decoding, resizing, normalising")
    queue: float = Field(description="waiting for the model, and for others to join the batch")
    inference: float = Field(description="the run of the whole batch")
    total: float = Field(description="from the request's headers to its answer")


class RegionInfo(BaseModel):
    """A connected area of the map above the pixel threshold, in pixels of the upright picture."""

    box: list[int] = Field(description="x and y of its left upper pixel, width, height")
    area: int = Field(description="how many pixels it has")
    centre: list[float] = Field(description="x and y, the mean of its pixels'")
    highest: float = Field(description="highest score in it, from 0 to 1")
    mean: float = Field(description="mean of its scores")


class Prediction(BaseModel):
    """What the model says of a picture."""

    model: str
    score: float = Field(description="image score, from 0 to 1")
    label: str = Field(description="Anomaly if the score is above image_threshold, else Normal")
    image_threshold: float
    pixel_threshold: float
    anomalous_share: float = Field(description="share of the map's pixels above pixel_threshold, from 0 to 1")
    size: list[int] = Field(description="height and width of the picture, upright")
    orientation: int = Field(
        description="how the pixels lie in the file, 1 to 8 as EXIF counts it; 1: upright. The picture was turned by it"
    )
    min_area: int = Field(description="regions of fewer pixels are left out")
    regions: list[RegionInfo] = Field(description="the one with the highest score first")
    map: str | None = Field(
        description="the smoothed anomaly map as a grey 8-bit PNG in base64, 0 to 255 for 0 to 1, of the size that "
        "map_size asks for: stretch it over the upright picture; null if it was not asked for"
    )
    batch_size: int = Field(description="how many pictures went through the model together")
    time_ms: Milliseconds


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    category: str
    input_size: list[int] = Field(description="height and width that pictures are resized to")
    image_score: str = Field(description="what of the anomaly map the score is: max: the largest value; top: a mean")
    top_share: float | None = Field(description="of top: of how many values, as a share of the input's area")
    image_threshold: float = Field(description="a picture is an anomaly above it")
    pixel_threshold: float = Field(description="a pixel is anomalous above it")
    min_area: int = Field(description="regions of fewer pixels of the picture are left out")


class ModelList(BaseModel):
    """The models that are served."""

    models: list[ModelInfo]


class Problem(BaseModel):
    """An error."""

    detail: str


PROBLEMS = {
    400: "the body cannot be read",
    403: "asked for by a page of another origin",
    404: "no such model",
    408: "the upload took too long",
    413: "the upload is too large",
    415: "the body is neither a form nor JSON",
    422: "not a picture, too many pixels, too long to decode, or a wrong option",
    503: "busy; come again after Retry-After seconds",
}
# ---- between uploads and the model


def decide(
    answer: Answer, size: tuple[int, int], thresholds: Thresholds, options: Options, map_wanted: bool
) -> tuple[Result, list[RegionInfo], bytes | None]:
    """What is decided of a picture of this size, its regions, and its map as a grey 8-bit PNG, if it is wanted.

    Of a large picture this takes memory and time: it is to be done for few at once, beside the event loop.
    """
    _, smoothed, image_score = answer.outputs  # (1, H, W), (1, H, W), ()
    result = Result(float(image_score), smoothed[0], size, thresholds)
    regions = [RegionInfo(**region.to_dict()) for region in result.regions]
    anomaly_map = result.map if map_wanted and options.map_size == "original" else smoothed[0]
    return result, regions, png(anomaly_map, 255) if map_wanted else None


def check_origin(request: Request, allowed: Collection[str]) -> None:
    """Refuse what a page from elsewhere makes a browser post; what no browser sends passes.

    Browsers say so in Sec-Fetch-Site, the older ones and all of those without HTTPS in Origin alone.

    Raises:
        HTTPException: 403.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site:
        own = site in ("same-origin", "none")
    else:
        own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not own and origin not in allowed and "*" not in allowed:
        raise problem(403, f"pages of {origin} may not post pictures here; --allow_origins lets them")


async def while_connected(request: Request, work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """The result of the work, which is cancelled when the client hangs up; the request's body must have been read.

    Raises:
        HTTPException: 400; nobody will read it, but it is counted.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise problem(400, "the client hung up")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait([task])  # until its place is free
        del task  # of its error the traceback holds this frame, and that of the body: a circle


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
        self._scores = prometheus_client.Histogram(
            "fastflow_score", "Scores of pictures", buckets=SCORE_BUCKETS, **common
        )
        self._anomalies = prometheus_client.Counter("fastflow_anomalies", "Pictures called an anomaly", **common)
        for name in models:
            self._scores.labels(name), self._anomalies.labels(name)  # 0 is a number too

    def count(self, model: str, result: Result) -> None:
        """Count what a picture's score comes to."""
        self._scores.labels(model).observe(result.score)
        self._anomalies.labels(model).inc(result.label == "Anomaly")

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


class Service:
    """What the addresses of the API do."""

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits, origins: Collection[str]) -> None:
        self._models = models
        self._origins = origins
        self._metrics = Metrics(models)
        self._uploads = Uploads(limits)
        self._decoders = Decoders(max(2, available_cores()), limits)  # few: a large picture takes much memory
        self._deciding = asyncio.Semaphore(1)  # so do its regions, and its map

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """From the start of the service to its end, which closes the models' queues."""
        await self._decoders.start()
        yield
        for model in self._models.values():
            await asyncio.to_thread(model.batcher.close)
        await self._decoders.close()

    async def live(self) -> dict[str, str]:
        """Answer, whatever the models do."""
        return {"status": "live"}

    async def ready(self) -> dict[str, str]:
        """Answer 503 if a model has stopped."""
        stopped = [name for name, model in self._models.items() if not model.batcher.alive]
        if stopped:
            raise problem(503, f"stopped: {', '.join(stopped)}")
        return {"status": "ready"}

    async def metrics(self) -> Response:
        """Requests, errors, times, batches, and the process's own figures."""
        text = prometheus_client.generate_latest(self._metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def models(self) -> ModelList:
        """Names, input sizes and thresholds."""
        served = self._models.items()
        return ModelList(models=[ModelInfo(**{**model.description, "name": name}) for name, model in served])

    async def predict(self, name: str, request: Request) -> Prediction | Response:
        """A picture in, as a form or as JSON; its score and regions out.

        With `Accept: image/png` its map comes out, as a grey 8-bit PNG, and the score and label as headers.
        """
        # Prometheus keeps every label for ever, so names that clients make up share one.
        with self._metrics.watch(name if name in self._models else "unknown"):
            check_origin(request, self._origins)
            if name not in self._models:
                raise problem(404, f"no model {name}; there are: {', '.join(self._models)}")
            try:
                return await self._score(name, request)
            except Full:
                raise busy() from None
            except UserError as error:
                raise problem(422, str(error)) from error

    async def _score(self, name: str, request: Request) -> Prediction | Response:
        model = self._models[name]
        begun = time.perf_counter()
        async with self._uploads.read(request) as (content, options):
            received = time.perf_counter()
            picture, decoded, answer = await while_connected(request, self._run(name, content))
        self._metrics.batch_size.labels(name).observe(answer.batch_size)
        as_png = "image/png" in request.headers.get("accept", "")
        thresholds = model.thresholds.or_given(options.image_threshold, options.pixel_threshold, options.min_area)
        async with self._deciding:
            work = (answer, picture.size, thresholds, options, as_png or options.map)
            result, regions, png_map = await asyncio.to_thread(decide, *work)
        self._metrics.count(name, result)
        if as_png:
            told = dict(zip(HEADERS, (f"{result.score:.6f}", result.label), strict=True))
            return Response(png_map, media_type="image/png", headers=told)
        seconds = {
            "upload": received - begun,
            "preprocess": decoded - received,
            "queue": answer.waited,
            "inference": answer.ran,
            "total": time.perf_counter() - begun,
        }
        return Prediction(
            model=name,
            score=result.score,
            label=result.label,
            image_threshold=thresholds.image,
            pixel_threshold=thresholds.pixel,
            anomalous_share=float(np.mean(answer.outputs[1] > thresholds.pixel)),
            size=list(picture.size),
            orientation=picture.orientation,
            min_area=thresholds.min_area,
            regions=regions,
            map=None if png_map is None else base64.b64encode(png_map).decode(),
            batch_size=answer.batch_size,
            time_ms=Milliseconds(**{what: 1000 * value for what, value in seconds.items()}),
        )

    async def _run(self, name: str, content: bytes) -> tuple[Decoded, float, Answer]:
        """The picture, when it was decoded, and what the model says of it."""
        model = self._models[name]
        with model.batcher.place() as hand_in:
            picture = await self._decoders.decode(content, model.description)
            return picture, time.perf_counter(), await asyncio.wrap_future(hand_in(picture.item))


def create_app(models: Mapping[str, ServedModel], limits: Limits, origins: Collection[str] = ()) -> FastAPI:
    """The service as an ASGI application. When it shuts down it closes the models' queues.

    Args:
        models: by the name in their address.
        limits: what requests may ask for.
        origins: whose pages may post pictures, beside the service's own; `*`: all.
    """
    service = Service(models, limits, origins)
    app = FastAPIOffline(title="FastFlow", version="1", lifespan=service.lifespan, redoc_url=None)
    app.add_middleware(FewAtOnce, path="/static-offline-docs", count=16, seconds=limits.upload_seconds)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["POST"], expose_headers=["Retry-After", *HEADERS]
        )
    app.add_exception_handler(Exception, server_error)
    app.get("/health/live", summary="Whether the process answers")(service.live)
    not_ready = {503: {"model": Problem}}
    app.get("/health/ready", summary="Whether every model takes pictures", responses=not_ready)(service.ready)
    app.get("/metrics", summary="Figures for Prometheus", response_class=Response)(service.metrics)
    app.get("/v1/models", summary="The models that are served")(service.models)
    app.post(
        "/v1/models/{name}:predict",
        summary="Score a picture",
        response_model=Prediction,
        responses={
            200: {"content": {"image/png": {}}, "description": "in JSON, or with Accept: image/png the map alone"},
            **{status: {"model": Problem, "description": text} for status, text in PROBLEMS.items()},
        },
        openapi_extra={"requestBody": BODY},
    )(service.predict)
    app.get("/", include_in_schema=False)(page)
    app.mount("/page", StaticFiles(directory=PAGE))
    return app


class FewAtOnce:
    """ASGI middleware: of what lies below a path so many answers at once, each in so many seconds; beyond: 503.

    For files that are larger than what the system takes from the process at once. Whoever asks for them and does not
    read would hold as many files open as connections.
    """

    def __init__(self, app: ASGIApp, path: str, count: int, seconds: float) -> None:
        self._app, self._path, self._seconds = app, path, seconds
        self._turns = asyncio.Semaphore(count)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope.get("path", "").startswith(self._path):
            await self._app(scope, receive, send)
        elif self._turns.locked():
            await JSONResponse({"detail": "busy; come again"}, 503)(scope, receive, send)
        else:
            with contextlib.suppress(TimeoutError):
                async with self._turns, asyncio.timeout(self._seconds):
                    await self._app(scope, receive, send)


async def server_error(_: Request, __: Exception) -> JSONResponse:
    """What is answered to whatever went wrong by itself."""
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)


async def page() -> FileResponse:
    """The page for people."""
    return FileResponse(PAGE / "index.html")
