"""One training step, as published."""

from collections.abc import Sequence

import paddle
from paddle import Tensor

from models.fastflow import FastFlow, negative_log_likelihood
from utils.config import Config


def build_optimizer(model: FastFlow, config: Config) -> paddle.optimizer.Adam:
    """Adam on the trainable parameters; Paddle clips the gradients first and adds the L2 decay to them afterwards."""
    return paddle.optimizer.Adam(
        config.lr,
        parameters=[p for p in model.parameters() if not p.stop_gradient],
        weight_decay=paddle.regularizer.L2Decay(config.weight_decay),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(config.clip_norm),
    )


def training_step(model: FastFlow, optimizer: paddle.optimizer.Optimizer, features: Sequence[Tensor]) -> Tensor:
    """Change the parameters once; return the loss before the change, a scalar still on the device."""
    loss = negative_log_likelihood(model.latents(features))
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    return loss.detach()
