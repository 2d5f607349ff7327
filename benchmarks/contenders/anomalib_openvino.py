"""anomalib's FastFlow for ResNet18 in OpenVINO, converted from PyTorch: normalised pictures to map and score."""

from importlib.metadata import version
from typing import Any

import openvino
import torch
from anomalib.models.image.fastflow.torch_model import FastflowModel

from benchmarks.contenders.anomalib import build_model
from benchmarks.inputs import random_images
from benchmarks.timing import repeat

SIZE = 256


class AnomalibOpenvino:
    """See benchmarks.contenders for the measurements."""

    def __init__(self, hidden_ratio: str, precision: str, threads: str) -> None:
        model = build_model(SIZE, float(hidden_ratio)).eval()
        converted = openvino.convert_model(
            _MapAndScore(model), example_input=torch.rand(1, 3, SIZE, SIZE), input=[-1, 3, SIZE, SIZE]
        )
        settings = {  # those of deploy.backends.OpenvinoModel
            "INFERENCE_NUM_THREADS": int(threads),
            "INFERENCE_PRECISION_HINT": precision.replace("fp", "f"),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
        self._description = {"precision": precision, "threads": threads}

    def describe(self) -> dict[str, Any]:
        """Versions, precision, threads."""
        return {"openvino": openvino.__version__, "anomalib": version("anomalib"), **self._description}

    def forward(self, size: int, batch: int, seconds: float) -> list[float]:
        images = random_images(batch, size)
        return repeat(lambda: self._request.infer([images]), seconds)


class _MapAndScore(torch.nn.Module):
    """The model with a plain tuple as its result: PyTorch's tracing knows no other."""

    def __init__(self, model: FastflowModel) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._model(images)
        return result.anomaly_map, result.pred_score
