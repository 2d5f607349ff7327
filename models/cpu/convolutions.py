"""Convolutions on the CPU: in which form they are fastest there, and whether oneDNN can be used at all.

`unavailable` says why not: no such library, another version, another result than Paddle's, no fast kernel for this CPU,
another system than Linux on x86-64, or FASTFLOW_ONEDNN=0 in the environment.
"""

import functools
import os
import threading
from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from deploy.common import runtime
from deploy.common.winograd import ROWS
from models.cpu.onednn import (
    EXP,
    F32,
    MUL,
    Buffer,
    Convolution,
    Layout,
    PostOps,
    Unavailable,
    WeightsGradient,
    library,
    multiply,
)
from models.cpu.products import WeightsGradientByProducts
from models.cpu.winograd import WinogradConvolution, WinogradWeightsGradient

AnyConvolution = Convolution | WinogradConvolution
AnyWeightsGradient = WeightsGradient | WeightsGradientByProducts | WinogradWeightsGradient

LOCK = threading.RLock()  # of who calls any of them: they share memory


def convolution(
    src: Sequence[int],  # (B, I, H, W)
    weights: Sequence[int],  # (O, I, kH, kW)
    stride: int = 1,
    post_ops: PostOps | None = None,
    kind: int = F32,
    dst_kind: int = F32,
) -> AnyConvolution:
    """The fastest form of a convolution that keeps H and W at stride 1.

    Measured on two cores of a Zen 3, which has AVX2 only, at the shapes of the published flows: by itself Winograd's
    form takes 0.7 to 0.9 of the time of the library's convolution with 64 channels and more, and as much with 32; a
    whole training step takes 0.94 of the time if those with 32 have it too. With AVX-512 (two cores of an Intel Xeon)
    a step takes five times as long with it.
    """
    direct = Convolution(src, weights, stride, post_ops=post_ops, kind=kind, dst_kind=dst_kind)
    if "avx2" in direct.implementation and kind == F32 and stride == 1 and _by_rows(src, weights):
        return WinogradConvolution(src, weights, post_ops)
    return direct


def weights_gradient(src: Sequence[int], weights: Sequence[int], kind: int = F32) -> AnyWeightsGradient:
    """The fastest form of the gradient of a convolution's weights; at stride 1.

    Measured as above: products take 0.56 to 0.84 of the time of the library's own kernel for AVX2, with a tenth of its
    rounding error, and Winograd's form 0.5 to 0.95 of that. On that Xeon the library's gradient is about as fast as its
    convolution.
    """
    direct = WeightsGradient(src, weights, kind)
    if direct.implementation != "jit:avx2":
        return direct
    return (WinogradWeightsGradient if _by_rows(src, weights) else WeightsGradientByProducts)(src, weights)


def _by_rows(src: Sequence[int], weights: Sequence[int]) -> bool:
    """Whether Winograd's form can be had of a convolution with stride 1."""
    return tuple(weights[2:]) == (3, 3) and src[2] % ROWS == 0


@functools.cache
def unavailable() -> str | None:
    """Why oneDNN is not used in this process; None where it is."""
    if os.environ.get("FASTFLOW_ONEDNN", "1") == "0":
        return "FASTFLOW_ONEDNN=0"
    try:
        with LOCK:
            self_check()
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def bfloat16_unavailable() -> str | None:
    """Why convolutions in bfloat16 would be no faster in this process; None where they are."""
    flags = runtime.cpu_flags()
    return unavailable() or (None if "avx512_bf16" in flags else "this CPU has no avx512_bf16")


def describe() -> str:
    """One line for a log: which convolutions a model on the CPU uses, and why."""
    reason = unavailable()
    if reason:
        return f"CPU path: Paddle's own convolutions (oneDNN is not used: {reason})"
    return f"CPU path: oneDNN {library().version} of the Paddle wheel, called directly (FASTFLOW_ONEDNN=0 turns it off)"


def self_check() -> None:
    """Compare with Paddle and numpy on a small case, both directions; a few milliseconds.

    Raises:
        Unavailable: another result, no fast kernel for this CPU, or a library that cannot be used at all.
    """
    shape, o = (2, 64, 8, 8), 72
    random = np.random.default_rng(0)
    x, weights, bias, g = (random.standard_normal(s, np.float32) for s in (shape, (o, 64, 3, 3), o, (2, o, 8, 8)))
    with paddle.enable_grad():
        inputs = [paddle.to_tensor(a, place=paddle.CPUPlace(), stop_gradient=False) for a in (x, weights, bias)]
        y = F.conv2d(*inputs, padding=1)
        expected = paddle.grad(y, inputs, paddle.to_tensor(g, place=paddle.CPUPlace()))

    def last(a: np.ndarray) -> Buffer:
        return Buffer(np.ascontiguousarray(a.transpose(0, 2, 3, 1)))

    def first(buffer: Buffer) -> np.ndarray:
        return buffer.array.transpose(0, 3, 1, 2)

    src, dst, grad_dst, grad_src = last(x), Buffer.empty(2, 8, 8, o), last(g), Buffer.empty(2, 8, 8, 64)
    forward = convolution(shape, weights.shape, post_ops=PostOps().tanh_of_half())
    forward(src, forward.packed(weights), Buffer(bias), dst)
    gradient = weights_gradient(shape, weights.shape)
    grad_weights, grad_bias = Buffer.empty(gradient.size), Buffer.empty(o)
    gradient(src, grad_dst, grad_weights, grad_bias)
    adjoint = convolution(g.shape, (64, o, 3, 3))
    adjoint(grad_dst, adjoint.packed_adjoint(weights), Buffer(np.zeros(64, np.float32)), grad_src)
    flat, product = Layout.dense([dst.array.size]), Buffer.empty(2, 8, 8, o)
    exp_times = multiply(flat, Layout.dense([1]), PostOps().eltwise(EXP).binary(MUL, flat))
    exp_times(dst, Buffer(np.full(1, 2, np.float32)), product, dst)
    pairs = [
        (first(dst), np.tanh(y.numpy() / 2)),
        (first(grad_src), expected[0].numpy()),
        (gradient.unpacked(grad_weights.array), expected[1].numpy()),
        (grad_bias.array, expected[2].numpy()),
        (product.array, np.exp(2 * dst.array) * dst.array),
    ]
    if not all(np.allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max()) for a, e in pairs):
        raise Unavailable(f"oneDNN {library().version} computes something else than Paddle")
