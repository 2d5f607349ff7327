"""Optimizer, step and epoch, as published."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor

from deploy.cli import UserError
from models.fastflow import FastFlow, negative_log_likelihood
from utils import distributed
from utils.averaging import WeightAverage
from utils.config import Config
from utils.features import FeatureCache
from utils.log import IterationTimes

WARM_UP = 0.025  # of all steps: one epoch of 40


def build_optimizer(model: FastFlow, config: Config) -> paddle.optimizer.Adam:
    """Adam on the trainable parameters; Paddle clips the gradients first and adds the L2 decay to them afterwards."""
    return paddle.optimizer.Adam(
        config.lr,
        parameters=[p for p in model.parameters() if not p.stop_gradient],
        weight_decay=paddle.regularizer.L2Decay(config.weight_decay),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(config.clip_norm),
    )


def learning_rate(config: Config, done: float) -> float:
    """The learning rate after the share `done`, in [0, 1), of all steps.

    constant: lr, as published. cosine: it rises in a straight line over the first `WARM_UP` of the steps and falls
    to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983),

        lr min(1, done / WARM_UP) (1 + cos(pi done)) / 2

    so that the last steps are too small to carry the weights anywhere.
    """
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2


def training_step(
    model: FastFlow, optimizer: paddle.optimizer.Optimizer, features: Sequence[Tensor], weight: float = 1.0
) -> Tensor:
    """Change the parameters once.

    Args:
        features: of this process's share of the batch, (B, C, h, w) per scale.
        weight: of the share in the mean over the global batch.

    Returns:
        the loss of the global batch before the change, a scalar still on the device.
    """
    loss = negative_log_likelihood(model.latents(features)) * weight
    loss.backward()
    total = loss.detach()
    distributed.sum_over_processes([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    optimizer.step()
    optimizer.clear_grad()
    return total


def train_epoch(
    model: FastFlow,
    optimizer: paddle.optimizer.Optimizer,
    features: FeatureCache,
    config: Config,
    epoch: int,
    average: WeightAverage,
    log: Callable[[str], None],
) -> float:
    """One pass over all pictures in an order that depends on seed and epoch only; the last partial batch is kept.

    Args:
        epoch: from 1.
        average: takes in the parameters after each step.
        log: takes the published log line, every `config.log_interval` iterations and at the last one.

    Returns:
        the mean loss over the pictures.

    Raises:
        UserError: the loss or a parameter is no longer a finite number.
    """
    model.train()
    order = np.random.default_rng([config.seed, epoch]).permutation(len(features))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    total = paddle.zeros([])  # stays on the device: reading it at every step would make a GPU wait
    times = IterationTimes()
    for iteration, indices in enumerate(batches, start=1):
        part, weight = distributed.share(indices)
        batch = features.batch(part)
        times.batch_read()
        optimizer.set_lr(learning_rate(config, (epoch - 1 + (iteration - 0.5) / len(batches)) / config.epochs))
        loss = training_step(model, optimizer, batch, weight)
        average.update()
        total += loss * len(indices)
        times.step_done(len(indices))
        if iteration == 1 or iteration % config.log_interval == 0 or iteration == len(batches):
            seen = min(iteration * config.batch_size, len(order))
            log(
                f"Epoch {epoch} - iter:{iteration}/{len(batches)} - lr:{optimizer.get_lr():g} - "
                f"loss = {_finite(loss, epoch):.3f}/{_finite(total / seen, epoch):.3f} (last/avg) - {times.summary()}"
            )
    _finite(paddle.stack([p.abs().max() for p in model.parameters() if not p.stop_gradient]).max(), epoch)
    return total.item() / len(order)


def _finite(value: Tensor, epoch: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise UserError(
            f"training diverged in epoch {epoch} (loss or parameters are {number}); "
            "the checkpoints of the epoch before are kept, a lower lr helps"
        )
    return number
