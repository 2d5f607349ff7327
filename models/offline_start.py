"""A start for the backbone on a machine that holds no ImageNet weights and cannot download any."""

import numpy as np
import paddle
from paddle import Tensor, nn


@paddle.no_grad()
def calibrated_start(backbone: nn.Layer, images: np.ndarray, seed: int) -> None:
    """Give the backbone smooth random filters, and BatchNorm statistics measured on training images.

    Convolutions: each k x k slice of a kernel is white noise Z seen through a Gaussian blur,

        w = G Z G^T,   G[i, j] = exp(-(i - j)^2 / 2),   then w <- w * sqrt(2 / fan_in) / std(w),

    so neighbouring taps agree. White noise kernels (He) pass on the pixels' noise, which a flow cannot predict;
    zero-mean and whitened filters do so even more, and were worse still at finding defects.

    Linear layers: white noise of variance 1 / fan_in.

    BatchNorm: weight 1, bias 0, and for each channel the mean and variance of what the convolution before it gives
    on the images,

        y <- (y - mean) / sqrt(variance + epsilon).

    Without this every channel follows the brightness, and a dark defect looks more normal than a bright background.
    One forward pass does it: every BatchNorm takes its statistics from the input it receives, when all layers before
    it are already calibrated (data-dependent initialisation, Krähenbühl et al. 2016, arXiv:1511.06856).

    The same backbone, images and seed give the same weights on the same machine.

    Args:
        backbone: any network of Conv2D, Linear and BatchNorm2D that takes (B, 3, H, W). Set in place and left in eval
            mode.
        images: (N, 3, H, W) float32, normalised; 16 are plenty.
        seed: of the filters.
    """
    rng = np.random.default_rng(seed)
    hooks = []
    for layer in backbone.sublayers():
        if isinstance(layer, nn.Conv2D):
            layer.weight.set_value(_smooth_filters(rng, layer.weight.shape))
        elif isinstance(layer, nn.Linear):
            inputs, _ = layer.weight.shape
            layer.weight.set_value(rng.standard_normal(layer.weight.shape, np.float32) / np.float32(inputs**0.5))
        elif isinstance(layer, nn.BatchNorm2D):
            layer.weight.set_value(paddle.ones_like(layer.weight))
            layer.bias.set_value(paddle.zeros_like(layer.bias))
            hooks.append(layer.register_forward_pre_hook(_take_statistics))
    backbone.eval()
    try:
        if hooks:
            backbone(paddle.to_tensor(images))
    finally:
        for hook in hooks:
            hook.remove()


def _smooth_filters(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Random kernels (C_out, C_in, kH, kW), blurred by sigma = 1 pixel; a 1 x 1 kernel stays as drawn."""
    kernels = _blur(shape[2]) @ rng.standard_normal(shape) @ _blur(shape[3]).T  # (C_out, C_in, kH, kW)
    return (kernels * np.sqrt(2 / np.prod(shape[1:])) / kernels.std()).astype("float32")


def _blur(taps: int) -> np.ndarray:
    """G of `calibrated_start`, (taps, taps)."""
    i = np.arange(taps)
    return np.exp(-((i[:, None] - i) ** 2) / 2)


def _take_statistics(norm: nn.BatchNorm2D, inputs: tuple[Tensor]) -> None:
    """Set the running statistics of `norm` to those of the batch (B, C, H, W) that it is about to normalise."""
    (y,) = inputs
    mean = _mean(y)
    norm._mean.set_value(mean)
    norm._variance.set_value(_mean((y - mean.reshape([1, -1, 1, 1])).square()))


def _mean(y: Tensor) -> Tensor:
    """(B, C, H, W) -> (C,), an axis at a time.

    Over all three at once Paddle's CPU kernel (3.3.1) adds up float32 numbers one by one: of 16 pictures the variance
    is then wrong in its fourth digit, and another number of threads gives visibly other losses.
    """
    return y.mean(3).mean(2).mean(0)
