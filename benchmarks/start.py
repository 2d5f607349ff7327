"""The same model in every process. It imports paddle and sets nothing up: that is the process's own affair."""

import os
from typing import Any

import paddle

from benchmarks.inputs import ROOT
from models.fastflow import FastFlow
from utils.config import Config, load_config
from utils.weights import VARIABLE, load_backbone


def published_config(size: int = 256, **changes: Any) -> Config:
    """The published configuration at an image size."""
    return load_config(ROOT / "configs/resnet18.yaml", input_size=size, **changes)


def same_model(config: Config) -> FastFlow:
    """A model whose parameters depend on the config only.

    The backbone has the weights that FASTFLOW_BACKBONE_WEIGHTS names, else random ones.
    """
    paddle.seed(config.seed)
    model = FastFlow(config)
    if os.environ.get(VARIABLE):
        load_backbone(model.feature_extractor, config, None, [])
    return model
