"""anomalib's own FastFlow for ResNet18 in PyTorch, at the published depth and width.

Its block has one coupling where a published step has two with a shared subnet, so 8 of its blocks do the couplings of
4 published steps: as many convolutions of the same shapes, twice the parameters. It normalises features by LayerNorm
where the published model has BatchNorm. Training is as in anomalib's Lightning module, by hand: its model, its loss,
its Adam; features are computed in every step. Needs torch and anomalib, not paddle.
"""

import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.metrics import AUROC
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel

from benchmarks.inputs import random_images, spread
from benchmarks.timing import peak_memory, repeat, repeat_steps
from datasets.mvtec import load_category, load_ground_truth, read_batches
from deploy.common.imaging import normalise

FLOW_STEPS = 8


class Anomalib:
    """See benchmarks.contenders for the measurements."""

    def __init__(self, hidden_ratio: str) -> None:
        self._hidden_ratio = float(hidden_ratio)
        self._loss = FastflowLoss()
        self._use(256)

    def describe(self) -> dict[str, Any]:
        """Versions and threads."""
        trainable = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        return {
            "torch": torch.__version__,
            "anomalib": version("anomalib"),
            "runtime": {"torch threads": str(torch.get_num_threads())},
            "trainable parameters": trainable,
        }

    def step(self, size: int, batch: int, backbone: bool, seconds: float) -> dict[str, Any]:
        self._use(size)
        self._model.train()
        images = torch.from_numpy(random_images(batch, size))
        whole = self._model.feature_extractor
        losses = []

        def passes() -> None:
            loss = self._loss(*self._model(images))
            loss.backward()
            losses.append(loss.item())

        def update() -> None:
            self._optimizer.step()
            self._optimizer.zero_grad()

        if not backbone:
            whole.eval()
            self._model.feature_extractor = Known(whole(images))
        try:
            samples = repeat_steps(passes, update, seconds)
        finally:
            self._model.feature_extractor = whole
        return {**samples, "loss": losses[0]}

    def forward(self, size: int, batch: int, seconds: float) -> list[float]:
        self._use(size)
        self._model.eval()
        images = torch.from_numpy(random_images(batch, size))
        with torch.inference_mode():
            return repeat(lambda: self._model(images), seconds)

    def epoch(self, data: str, category: str, train: int, test: int, batch: int) -> dict[str, Any]:
        size = 256
        self._use(size)
        pictures = load_category(Path(data), category)
        tested = spread(pictures.test, test)
        truth = load_ground_truth(tested, (size, size), "published")
        begun = time.perf_counter()
        self._model.train()
        order = torch.randperm(train).tolist()
        trained_on = spread(pictures.train, train)
        for batch_read in read_batches([trained_on[i] for i in order], batch, (size, size)):
            self._loss(*self._model(torch.from_numpy(normalise(batch_read)))).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        trained = time.perf_counter()
        self._model.eval()
        image = AUROC(fields=["pred_score", "gt_label"])
        pixel = AUROC(fields=["anomaly_map", "gt_mask"])
        done = 0
        with torch.inference_mode():
            for batch_read in read_batches([picture.path for picture in tested], batch, (size, size)):
                now = slice(done, done + len(batch_read))
                found = SimpleNamespace(
                    **self._model(torch.from_numpy(normalise(batch_read)))._asdict(),
                    gt_label=torch.from_numpy(truth.labels[now]).int(),
                    gt_mask=torch.from_numpy(truth.masks[now]).int(),
                )
                image.update(found)
                pixel.update(found)
                done += len(batch_read)
            aurocs = image.compute().item(), pixel.compute().item()
        return {
            "features": 0.0,  # in every step
            "training": trained - begun,
            "evaluation": time.perf_counter() - trained,
            "image": aurocs[0],
            "pixel": aurocs[1],
            "peak": peak_memory(),
        }

    def _use(self, size: int) -> None:
        """Make the model for this image size, unless it is there."""
        if getattr(self, "_size", None) != size:
            self._model = build_model(size, self._hidden_ratio)
            # as its configure_optimizers
            self._optimizer = torch.optim.Adam(self._model.parameters(), lr=0.001, weight_decay=0.00001)
            self._size = size


def build_model(size: int, hidden_ratio: float) -> FastflowModel:
    """The model for this image size, with random weights, the same ones every time."""
    torch.manual_seed(0)
    return FastflowModel(
        (size, size),
        "resnet18",
        pre_trained=False,
        flow_steps=FLOW_STEPS,
        conv3x3_only=True,
        hidden_ratio=hidden_ratio,
    )


class Known(torch.nn.Module):
    """In the feature extractor's place: features that are already known."""

    def __init__(self, features: list[torch.Tensor]) -> None:
        super().__init__()
        self._features = features

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self._features
