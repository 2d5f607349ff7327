"""This repository's FastFlow, by the functions that train.py and eval.py call."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import paddle

from benchmarks.inputs import ROOT, random_images, random_maps, spread
from benchmarks.start import published_config, same_model
from benchmarks.timing import peak_memory, repeat, repeat_steps
from datasets.mvtec import load_category, load_ground_truth
from models.cpu import convolutions
from models.fastflow import negative_log_likelihood
from utils.checkpoint import published_state, save_checkpoint
from utils.config import load_config
from utils.evaluation import EVALUATION_BATCH, Scores, measure, score_images
from utils.features import CacheBudget, FeatureCache
from utils.training import Training, build_optimizer


class Ours:
    """See benchmarks.contenders for the measurements."""

    def __init__(self, runtime: dict[str, str], config: str = "configs/resnet18.yaml") -> None:
        """A config, of the repository's."""
        self._runtime, self._config = runtime, load_config(ROOT / config)
        self._use(self._config.size[0])

    def describe(self) -> dict[str, Any]:
        """Versions and the runtime set-up."""
        return {
            "paddle": paddle.__version__,
            "runtime": {**self._runtime, "convolutions": convolutions.describe()},
            "trainable parameters": self._model.trainable_parameters(),
        }

    def step(self, size: int, batch: int, backbone: bool, seconds: float) -> dict[str, Any]:
        self._use(size)
        self._model.train()
        images = paddle.to_tensor(random_images(batch, size))
        cached = self._model.feature_extractor(images)
        losses = []

        def passes() -> None:
            features = self._model.feature_extractor(images) if backbone else cached
            loss = negative_log_likelihood(self._model.latents(features))
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

    def peak(self) -> int:
        return peak_memory()

    def save(self, file: str) -> None:
        content = {"epoch": 0, "model_state_dict": published_state(self._model), "config": self._config.as_dict()}
        save_checkpoint(Path(file), content)

    def evaluate(self, count: int, seconds: float) -> dict[str, Any]:
        self._use(256)
        maps, truth = random_maps(count)
        aurocs = []

        @paddle.no_grad()
        def once() -> None:
            image, pixel = [], []
            for start in range(0, count, EVALUATION_BATCH):
                part = paddle.to_tensor(maps[start : start + EVALUATION_BATCH, None])
                image.append(part.max(axis=[1, 2, 3]))
                pixel.append(self._model.smooth(part)[:, 0])
            aurocs.append(measure(Scores(paddle.concat(image).numpy(), paddle.concat(pixel).numpy()), truth))

        samples = repeat(once, seconds)
        return {"seconds": samples, "image": aurocs[0][0], "pixel": aurocs[0][1]}

    def epoch(self, data: str, category: str, train: int, test: int, batch: int) -> dict[str, Any]:
        config = published_config(batch_size=batch)
        training = Training(same_model(config), config)
        pictures = load_category(Path(data), category)
        tested = spread(pictures.test, test)
        truth = load_ground_truth(tested, config.size, config.mask_rule)
        begun = time.perf_counter()
        backbone, layout = training.model.feature_extractor, config.layout
        budget = CacheBudget.from_options(None, None, None)
        train_features = FeatureCache(backbone, spread(pictures.train, train), layout, budget, "train")
        test_features = FeatureCache(backbone, [picture.path for picture in tested], layout, budget, "test")
        cached = time.perf_counter()
        training.epoch(train_features, lambda line: None)
        trained = time.perf_counter()
        image, pixel = measure(score_images(training.model, test_features), truth)
        return {
            "features": cached - begun,
            "training": trained - cached,
            "evaluation": time.perf_counter() - trained,
            "image": image,
            "pixel": pixel,
            "peak": peak_memory(),
        }

    def _use(self, size: int) -> None:
        """Make the model for this image size, unless it is there."""
        if getattr(self, "_size", None) != size:
            config = dataclasses.replace(self._config, input_size=size)
            self._model = same_model(config)
            self._optimizer = build_optimizer(self._model, config)
            self._size = size
