"""Optimizer, step and epoch, as published."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from deploy.common.cli import UserError, warn
from models.cpu import convolutions
from models.fastflow import FastFlow, negative_log_likelihood
from utils import distributed
from utils.averaging import WeightAverage
from utils.checkpoint import fill_model, history_of, load_checkpoint, not_ours, published_state
from utils.config import Config, keys_that_decide
from utils.features import FeatureCache
from utils.history import EpochRow, selection_value
from utils.log import IterationTimes
from utils.loss_scale import LossScale

WARM_UP = 0.025  # of all steps: one epoch of 40
RESUME_KEYS = keys_that_decide("resume")
TRAINING_KEYS = keys_that_decide("training")


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


class Training:
    """A model in training, with all that goes on from one epoch to the next and into a checkpoint."""

    def __init__(self, model: FastFlow, config: Config, held_out: Sequence[str] = ()) -> None:
        """
        Args:
            model: changed in place.
            config: of the model and of the training.
            held_out: names of the good pictures that are kept from this training.
        """
        self.model, self.config, self.held_out = model, config, list(held_out)
        self.history: list[EpochRow] = []
        self.backbone: dict[str, Any] = {}  # where its weights are from
        self._steps = 0  # up to the end of the last epoch
        self.learnt_from: str | None = None  # digest of the names of its pictures
        dtype, self.precision = mixed_precision() if config.amp else ("float32", "float32")
        model.train_in(dtype)
        self.optimizer = build_optimizer(model, config)
        self.average = WeightAverage(model, config.ema_decay)
        self.scale = LossScale() if dtype == "float16" else None

    def steps(self, pictures: int) -> tuple[int, int]:
        """How many steps are done, and how many the whole training has over so many pictures."""
        config, iterations = self.config, math.ceil(pictures / self.config.batch_size)
        if config.steps is None:
            return len(self.history) * iterations, config.epochs * iterations
        return (self.history[-1].steps if self.history else 0), config.steps

    def last_epoch(self, pictures: int) -> int:
        """The epoch over so many pictures that ends the training, counted from 1; or the one that did."""
        done, total = self.steps(pictures)
        return len(self.history) + math.ceil(max(0, total - done) / math.ceil(pictures / self.config.batch_size))

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint that train.py wrote.

        A training in another precision has stored no loss scale; a new one is found within a few steps. A warning
        names the settings that the config changes and that later epochs depend on.

        Raises:
            UserError: no such file, damaged, not written by train.py, or trained under settings that the config
                changes.
        """
        checkpoint = load_checkpoint(path)
        fill_model(self.model, self.config, checkpoint, path)
        trained = checkpoint.get("config", {})
        for key in RESUME_KEYS:
            if key in trained and trained[key] != getattr(self.config, key):
                raise UserError(
                    f"{path}: was trained with {key} {trained[key]}, the config says {getattr(self.config, key)}; "
                    f"--resume goes on only with -o {key}={trained[key]}"
                )
        if checkpoint.get("held_out", []) != self.held_out:
            raise UserError(
                f"{path}: other pictures are held out now than when it was trained (seed or the folder's content has "
                "changed), so --resume would learn from them; train again without it"
            )
        if self.config.ema_decay:
            self.average.resume(checkpoint.get("average"), str(path))
        if self.scale and "loss_scale" in checkpoint:
            self.scale.resume(checkpoint["loss_scale"], str(path))
        history = history_of(checkpoint, path)
        if self.config.steps is not None and history[-1].steps is None:
            raise UserError(f"{path}: its steps were not counted; --resume goes on only with -o steps=null")
        try:
            self.backbone = checkpoint.get("backbone")
            if not self.backbone:
                raise ValueError("it does not say where the backbone's weights are from")
            self.optimizer.set_state_dict(_optimizer_state(self.model, checkpoint["optimizer_state_dict"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise not_ours(path, error) from error
        self.history = history
        _warn_of_changes(trained, self.config, path)

    def epoch(
        self, features: FeatureCache, log: Callable[[str], None], step_done: Callable[[], object] = lambda: None
    ) -> float:
        """Go once over all pictures in an order that depends on seed and epoch only; the last partial batch is kept.

        Under a budget in steps it ends where that does, and its batches are of equal sizes, but for one picture: of 9
        pictures a second batch of one, in every other step, would teach little but noise.

        Args:
            features: of the training pictures.
            log: takes the published log line, every `config.log_interval` iterations and at the first and the last
                one, and at the end a line about steps that were left out, if any were.
            step_done: is called after each iteration.

        Returns:
            the mean of the iterations' losses, as published: a smaller last batch counts like the others.

        Raises:
            UserError: the loss or a parameter is no longer a finite number.
        """
        config, optimizer, epoch = self.config, self.optimizer, len(self.history) + 1
        self.model.train()
        order = np.random.default_rng([config.seed, epoch]).permutation(len(features))
        batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
        done, total = self.steps(len(features))
        if config.steps is not None:
            batches = np.array_split(order, len(batches))[: total - done]
        losses = paddle.zeros([])  # their sum stays on the device: reading it at every step would make a GPU wait
        times = IterationTimes()
        skipped_before = self.scale.skipped if self.scale else 0
        for iteration, indices in enumerate(batches, start=1):
            rows, weight = distributed.share(np.arange(len(indices)))
            batch = features.batch(indices[rows])
            noise: list[Tensor] = []
            if config.feature_noise:
                drawn = draw_noise(batch, rows, len(indices), [config.seed, epoch, iteration])
                noise = [config.feature_noise * n for n in drawn]
            times.batch_read()
            optimizer.set_lr(learning_rate(config, (done + iteration - 0.5) / total))
            loss = training_step(self.model, optimizer, batch, weight, self.scale, noise)
            self.average.update()
            losses += loss
            times.step_done(len(indices))
            step_done()
            if iteration == 1 or iteration % config.log_interval == 0 or iteration == len(batches):
                last, mean = _finite(loss, epoch), _finite(losses / iteration, epoch)
                log(
                    f"Epoch {epoch} - iter:{iteration}/{len(batches)} - lr:{optimizer.get_lr():g} - "
                    f"loss = {last:.3f}/{mean:.3f} (last/avg) - {times.summary()}"
                )
        if self.scale and self.scale.skipped > skipped_before:
            log(
                f"Epoch {epoch} - {self.scale.skipped - skipped_before} of {len(batches)} steps skipped, "
                f"for their float16 gradients were not finite; the loss scale is {self.scale.state()['scale']:g} now"
            )
        # Squares: of larger parameters the flows make infinities, which a ReLU may turn into scores that look fine.
        trained = [p for p in self.model.parameters() if not p.stop_gradient]
        _finite(paddle.stack([p.square().max() for p in trained]).max(), epoch)
        self._steps = done + len(batches)
        return losses.item() / len(batches)

    def record(
        self, loss: float, image: float | None, pixel: float | None, val_loss: float | None, seconds: float
    ) -> None:
        """Note an epoch: its mean loss, AUROCs and held-out loss where they were measured, and how long it took."""
        selection = selection_value(self.config, image, pixel, val_loss)
        lr = self.optimizer.get_lr()
        row = EpochRow(len(self.history) + 1, loss, lr, image, pixel, selection, seconds, val_loss, self._steps)
        self.history.append(row)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds after the epoch that was noted last."""
        with self.average.applied():
            content = {
                "epoch": len(self.history),
                "model_state_dict": published_state(self.model),
                "optimizer_state_dict": self.optimizer.state_dict(),
                "backbone": self.backbone,
                "config": self.config.as_dict(),
                "history": [asdict(row) for row in self.history],
                "held_out": self.held_out,
                "learnt_from": self.learnt_from,
            }
            if self.config.ema_decay:
                content["average"] = self.average.state()
        if self.scale:
            content["loss_scale"] = self.scale.state()
        return content


def _warn_of_changes(trained: dict[str, Any], config: Config, path: Path) -> None:
    """Name the settings that a resumed training depends on and that are not those of the checkpoint's config."""
    now = config.as_dict()
    keys = TRAINING_KEYS
    if "cosine" in (trained.get("lr_schedule"), config.lr_schedule):  # it ends with the training
        keys = (*keys, "steps" if config.steps is not None or trained.get("steps") is not None else "epochs")
    changed = [f"{key} {trained[key]} is now {now[key]}" for key in keys if key in trained and trained[key] != now[key]]
    if changed and distributed.is_first():
        warn(
            f"{path}: --resume goes on with other settings ({', '.join(changed)}), so not to the losses of one training"
        )


def _optimizer_state(model: FastFlow, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Adam's moments, or a ValueError if one is missing or unfit: Paddle would start anew or fail at the first step."""
    moments = {}
    for parameter in (parameter for parameter in model.parameters() if not parameter.stop_gradient):
        shapes = {"moment1": parameter.shape, "moment2": parameter.shape, "beta1_pow_acc": [1], "beta2_pow_acc": [1]}
        for kind, shape in shapes.items():
            name = f"{parameter.name}_{kind}_0"
            value = state.get(name)
            if not isinstance(value, np.ndarray) or value.dtype != np.float32 or list(value.shape) != list(shape):
                raise ValueError(f"its optimizer has no {kind} of {parameter.name}")
            moments[name] = value
    return moments


def _finite(value: Tensor, epoch: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise UserError(
            f"training diverged in epoch {epoch} (loss or parameters are {number}); "
            "the checkpoints of the epoch before are kept, a lower lr helps"
        )
    return number
