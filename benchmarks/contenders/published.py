"""The published graph in plain Paddle, in whatever environment the process was started with."""

import os
import time
from pathlib import Path
from typing import Any

import paddle

from benchmarks.inputs import random_images, random_maps, spread
from benchmarks.published import ListEvaluation, PublishedFastFlow, evaluate, train_epoch
from benchmarks.start import published_config, same_model
from benchmarks.timing import peak_memory, repeat, repeat_steps
from datasets.mvtec import load_category, load_ground_truth
from utils.checkpoint import published_state
from utils.config import Config
from utils.training import build_optimizer


def same_published_model(config: Config) -> PublishedFastFlow:
    """The published graph with the parameters of `same_model`."""
    model = PublishedFastFlow(config)
    model.set_published_state(published_state(same_model(config)))
    return model


class Published:
    """See benchmarks.contenders for the measurements."""

    def __init__(self) -> None:
        self._use(256)

    def describe(self) -> dict[str, Any]:
        """Versions and the environment."""
        return {
            "paddle": paddle.__version__,
            "runtime": {n: os.environ.get(n, "not set") for n in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")},
            "trainable parameters": sum(p.size for p in self._model.parameters() if not p.stop_gradient),
        }

    def step(self, size: int, batch: int, backbone: bool, seconds: float) -> dict[str, Any]:
        self._use(size)
        self._model.train()
        images = paddle.to_tensor(random_images(batch, size))
        cached = self._model.feature_extractor(images)
        losses = []

        def passes() -> None:
            loss = self._model(images) if backbone else self._model.from_features(cached)
            loss.backward()
            losses.append(loss.item())

        def update() -> None:
            self._optimizer.step()
            self._optimizer.clear_grad()

        return {**repeat_steps(passes, update, seconds), "loss": losses[0]}

    def forward(self, size: int, batch: int, seconds: float) -> list[float]:
        self._use(size)
        self._model.eval()
        images = paddle.to_tensor(random_images(batch, size))
        with paddle.no_grad():
            return repeat(lambda: self._model(images), seconds)

    def evaluate(self, count: int, seconds: float) -> dict[str, Any]:
        maps, truth = random_maps(count)
        aurocs = []

        def once() -> None:
            lists = ListEvaluation()
            for anomaly_map, mask in zip(maps, truth.masks, strict=True):
                lists.add(anomaly_map, mask)
            aurocs.append(lists.measure())

        samples = repeat(once, seconds)
        return {"seconds": samples, "image": aurocs[0][0], "pixel": aurocs[0][1]}

    def epoch(self, data: str, category: str, train: int, test: int, batch: int) -> dict[str, Any]:
        config = published_config(batch_size=batch)
        model = same_published_model(config)
        optimizer = build_optimizer(model, config)
        pictures = load_category(Path(data), category)
        tested = spread(pictures.test, test)
        truth = load_ground_truth(tested, config.size, config.mask_rule)
        begun = time.perf_counter()
        train_epoch(model, optimizer, spread(pictures.train, train), batch)
        trained = time.perf_counter()
        image, pixel = evaluate(model, [picture.path for picture in tested], truth, batch)
        return {
            "features": 0.0,  # in every step
            "training": trained - begun,
            "evaluation": time.perf_counter() - trained,
            "image": image,
            "pixel": pixel,
            "peak": peak_memory(),
        }

    def _use(self, size: int) -> None:
        """Make the model for this image size, unless it is there."""
        if getattr(self, "_size", None) != size:
            config = published_config(size)
            self._model = same_published_model(config)
            self._optimizer = build_optimizer(self._model, config)
            self._size = size
