"""Optimizer, step and epoch, as published."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor

from deploy.common.cli import UserError
from models.cpu import convolutions
from models.fastflow import FastFlow, negative_log_likelihood
from utils import distributed
from utils.averaging import WeightAverage
from utils.config import Config
from utils.features import FeatureCache
from utils.log import IterationTimes
from utils.loss_scale import LossScale

WARM_UP = 0.025  # of all steps: one epoch of 40


def build_optimizer(model: FastFlow, config: Config) -> paddle.optimizer.Adam:
    """Adam on the trainable parameters; Paddle clips the gradients first and adds the L2 decay to them afterwards."""
    return paddle.optimizer.Adam(
        config.lr,
        parameters=[p for p in model.parameters() if not p.stop_gradient],
        weight_decay=paddle.regularizer.L2Decay(config.weight_decay),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(config.clip_norm),
    )


def mixed_precision() -> tuple[str, str]:
    """The dtype that `FastFlow.train_in` takes for mixed precision on the current device, and a line that says why."""
    if paddle.get_device() == "cpu":
        reason = convolutions.bfloat16_unavailable()
        return ("float32", f"float32, which is faster here ({reason})") if reason else ("bfloat16", "bfloat16")
    if paddle.amp.is_bfloat16_supported():
        return "bfloat16", "bfloat16"
    if paddle.amp.is_float16_supported():
        return "float16", "float16 with loss scaling (this GPU has no bfloat16)"
    return "float32", "float32 (this GPU has neither bfloat16 nor float16)"


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


def draw_noise(features: Sequence[Tensor], rows: np.ndarray, count: int, state: Sequence[int]) -> list[Tensor]:
    """Standard normal noise for the features of some pictures of a global batch.

    Added to the features it keeps a flow from learning the pictures by heart: a density cannot become narrower than
    the noise. (Bishop 1995, doi 10.1162/neco.1995.7.1.108, for networks in general.)

    Args:
        features: (B, C, h, w) per scale.
        rows: (B), which pictures of the batch they belong to.
        count: pictures in the batch; noise is drawn for all of them, so that several processes train like one.
        state: what the noise depends on beside the shapes: a resumed training draws the same.
    """
    paddle.seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
    chosen = paddle.to_tensor(rows)
    return [paddle.index_select(paddle.randn([count, *x.shape[1:]]), chosen) for x in features]


def backward(loss: Tensor) -> None:
    """The gradients of the loss; Ctrl-C in the backward pass of a `PyLayer` stays one.

    Raises:
        KeyboardInterrupt: it came meanwhile. Paddle makes an OSError of it that only names it in its text.
    """
    try:
        loss.backward()
    except OSError as error:
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        raise


def training_step(
    model: FastFlow,
    optimizer: paddle.optimizer.Optimizer,
    features: Sequence[Tensor],
    weight: float = 1.0,
    scale: LossScale | None = None,
    noise: Sequence[Tensor] = (),
) -> Tensor:
    """Change the parameters once, unless a scaled gradient is not finite.

    Args:
        features: of this process's share of the batch, (B, C, h, w) per scale.
        weight: of the share in the mean over the global batch.
        scale: of the loss, for a model that trains in float16.
        noise: is added to the normalised features.

    Returns:
        the loss of the global batch before the change, a scalar still on the device.
    """
    loss = negative_log_likelihood(model.latents(features, noise)) * weight
    backward(scale.scaled(loss) if scale else loss)
    total = loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    distributed.sum_over_processes([total, *gradients])  # so what is not finite is so in every process
    if scale:
        scale.step(optimizer, gradients)
    else:
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
    scale: LossScale | None,
    log: Callable[[str], None],
) -> float:
    """One pass over all pictures in an order that depends on seed and epoch only; the last partial batch is kept.

    Args:
        epoch: from 1.
        average: takes in the parameters after each step.
        scale: of the loss, for a model that trains in float16.
        log: takes the published log line, every `config.log_interval` iterations and at the last one, and at the end a
            line about steps that were left out, if any were.

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
    skipped_before = scale.skipped if scale else 0
    for iteration, indices in enumerate(batches, start=1):
        rows, weight = distributed.share(np.arange(len(indices)))
        batch = features.batch(indices[rows])
        noise: list[Tensor] = []
        if config.feature_noise:
            drawn = draw_noise(batch, rows, len(indices), [config.seed, epoch, iteration])
            noise = [config.feature_noise * n for n in drawn]
        times.batch_read()
        optimizer.set_lr(learning_rate(config, (epoch - 1 + (iteration - 0.5) / len(batches)) / config.epochs))
        loss = training_step(model, optimizer, batch, weight, scale, noise)
        average.update()
        total += loss * len(indices)
        times.step_done(len(indices))
        if iteration == 1 or iteration % config.log_interval == 0 or iteration == len(batches):
            seen = min(iteration * config.batch_size, len(order))
            log(
                f"Epoch {epoch} - iter:{iteration}/{len(batches)} - lr:{optimizer.get_lr():g} - "
                f"loss = {_finite(loss, epoch):.3f}/{_finite(total / seen, epoch):.3f} (last/avg) - {times.summary()}"
            )
    if scale and scale.skipped > skipped_before:
        log(
            f"Epoch {epoch} - {scale.skipped - skipped_before} of {len(batches)} steps skipped, "
            f"for their float16 gradients were not finite; the loss scale is {scale.state()['scale']:g} now"
        )
    # Squares: of larger parameters the flows make infinities, which a ReLU may turn into scores that look fine.
    _finite(paddle.stack([p.square().max() for p in model.parameters() if not p.stop_gradient]).max(), epoch)
    return total.item() / len(order)


def _finite(value: Tensor, epoch: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise UserError(
            f"training diverged in epoch {epoch} (loss or parameters are {number}); "
            "the checkpoints of the epoch before are kept, a lower lr helps"
        )
    return number
