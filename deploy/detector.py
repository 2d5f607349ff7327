"""An exported model as a Python object, which `deploy/infer.py` is the command of."""

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from deploy.backends import Options, load_exported, prepare_runtime
from deploy.common.cli import UserError as UserError
from deploy.common.decisions import Result, Thresholds
from deploy.common.imaging import PictureReader, drawn_size, preprocess
from deploy.description import read_description

Picture = str | Path | np.ndarray | Image.Image


@dataclass(frozen=True)
class Prepared:
    """A picture that was read."""

    item: np.ndarray  # (3, H, W) float32, what the model takes
    size: tuple[int, int]  # height and width of the picture, upright
    drawn: np.ndarray | None  # what is drawn on, of `drawn_size`: full-size pictures may be large
    path: str | Path | None  # its file, if it is one


class Detector:
    """Finds defects in pictures with an exported model. Any number of threads may use it at a time.

    One thread of its own runs the model, whichever thread asks: the runtimes promise no more, and each further thread
    in which they run costs memory. Reading, resizing and the regions are the work of who asks.
    """

    def __init__(
        self,
        folder: str | Path = "./results/inference",
        backend: str = "paddle",
        *,
        batch_size: int = 8,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        min_area: int | None = None,
        precision: str = "fp32",
        cpu_threads: int | None = None,
        use_gpu: bool = False,
        use_mkldnn: bool = True,
        use_tensorrt: bool = False,
        winograd: bool = False,
        usual_batches: Collection[int] | None = None,
        verbose: bool = False,
    ) -> None:
        """Load the model; the options are those of `deploy/infer.py`. Paddle must not have been imported before.

        Args:
            folder: what `deploy/export_model.py` has written.
            backend: paddle, onnxruntime or openvino.
            batch_size: the most pictures of a list that run together.
            image_threshold: a picture is an anomaly above it; None: the model's.
            pixel_threshold: a pixel is marked above it; None: the model's.
            min_area: regions of fewer pixels of the picture are left out; None: the model's.
            precision: fp32, fp16 or bf16, where the runtime has it.
            cpu_threads: of the model; None: as many as there are cores for this process.
            use_gpu: if there is one.
            use_mkldnn: paddle on a CPU: oneDNN.
            use_tensorrt: paddle on a GPU: TensorRT.
            winograd: openvino in fp32: faster on a CPU with AVX2 only.
            usual_batches: numbers of pictures that openvino makes a graph each for; None: 1 and `batch_size`.
            verbose: say on stderr what the runtime set-up chose.

        Raises:
            UserError: no exported model there, or damaged; the runtime is not installed or cannot do what is asked for.
        """
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.description = read_description(self.folder, backend)
        self.options = Options(
            use_gpu=use_gpu,
            threads=prepare_runtime(backend, cpu_threads, verbose),
            precision=precision,
            use_mkldnn=use_mkldnn,
            use_tensorrt=use_tensorrt,
            max_batch_size=batch_size,
            usual_batches={1, batch_size} if usual_batches is None else usual_batches,
            winograd=winograd,
        )
        self.stored = Thresholds.of(self.description)
        self.thresholds = self.stored.or_given(image_threshold, pixel_threshold, min_area)
        self._read = PictureReader(self.description["white_level"])
        self._model = load_exported(self.folder, backend, self.options)
        self._runner = ThreadPoolExecutor(1, "detector")

    @property
    def device(self) -> str:
        """Where the model runs: cpu or gpu."""
        return self._model.device

    @property
    def version(self) -> str:
        """Name and version of the runtime."""
        return self._model.version

    @overload
    def __call__(self, pictures: Picture) -> Result: ...

    @overload
    def __call__(self, pictures: Iterable[Picture]) -> list[Result]: ...

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Result | list[Result]:
        """The result of a picture; of several in a list or another iterable a list, in their order.

        Args:
            pictures: each one a path; an array, (H, W, 3) in RGB (OpenCV's are BGR) or (H, W) grey, uint8, or uint16
                with the white level of the training; or a picture of Pillow's. What EXIF says of the orientation of the
                first and the last is followed.

        Raises:
            UserError: a picture cannot be read, or the run failed; of a list nothing is returned then.
            RuntimeError: the detector is closed.
        """
        if isinstance(pictures, Picture):
            return self.decide([self.prepare(pictures)])[0]
        results: list[Result] = []
        batch: list[Prepared] = []
        for picture in pictures:
            batch.append(self.prepare(picture))
            if len(batch) == self.batch_size:
                results += self.decide(batch)
                batch = []
        return results + self.decide(batch)

    def prepare(self, picture: Picture, drawable: bool = True) -> Prepared:
        """Read a picture, the first half of a call.

        Args:
            picture: as a call takes it.
            drawable: whether its result shall be able to draw it, for which a small copy is kept.

        Raises:
            UserError: it cannot be read.
        """
        rgb = self._read(picture)
        height, width = self.description["input_size"]
        item = preprocess(rgb, height, width, self.description["mean"], self.description["std"])[0]
        path = picture if isinstance(picture, str | Path) else None
        return Prepared(item, rgb.shape[:2], drawn_size(rgb) if drawable else None, path)

    def decide(self, batch: Sequence[Prepared]) -> list[Result]:
        """Run the model on the pictures together, the second half of a call.

        Raises:
            UserError: the run failed, for want of memory perhaps.
            RuntimeError: the detector is closed.
        """
        if not batch:
            return []
        _, smoothed, scores = self.run(np.stack([prepared.item for prepared in batch]))
        return [
            Result(float(score), own[0], prepared.size, self.thresholds, prepared.drawn, prepared.path)
            for prepared, own, score in zip(batch, smoothed, scores, strict=True)
        ]

    def run(self, images: np.ndarray) -> list[Any]:
        """What the model itself says, see `deploy.backends.Backend.run`; it waits for its turn.

        Raises:
            UserError: as `Backend.run`.
            RuntimeError: the detector is closed.
        """
        try:
            running = self._runner.submit(self._model.run, images)
        except RuntimeError as error:
            raise RuntimeError("the detector is closed") from error
        return running.result()

    def close(self) -> None:
        """Wait for the run in progress and end the thread; the detector takes no more pictures."""
        self._runner.shutdown()

    def __enter__(self) -> "Detector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
