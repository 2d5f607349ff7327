"""A frozen backbone on the CPU, on oneDNN, with its BatchNorms folded into its convolutions.

    BatchNorm(conv(x)) = g (w * x) + bias - g mean,   g = weight / sqrt(variance + epsilon)

is the convolution with g w and another bias; `without_batch_norms` makes a network of these, for export. What follows a
convolution is a post-op: a block's last one adds itself to the residual, in the residual's own memory. Activations are
channels-last, in buffers that belong to a `Program` and are used by one block after the other; only the features
returned are written channels-first, into tensors of their own. `resnet` and `efficientnet` beside it say which calls
make up their networks.
"""

import copy
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn

from models.cpu.convolutions import LOCK, convolution
from models.cpu.flow import usable
from models.cpu.onednn import Buffer, Convolution, Layout, PostOps, Primitive, Unavailable, reorder

CHUNK = 4  # images that go through the network together, in little memory; the time is flat from 2 to 8
# Names of convolutions and the norms after them: in a ResNet, in its downsamples, in an EfficientNet.
PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"), ("conv", "norm"))
PROGRAMS = 4  # kept per model, each for one number and size of images
APART = 2039  # a prime above the number of filters: no two that change places are a multiple of it apart


def features(
    model: nn.Layer, images: Tensor, plain: Callable[[Tensor], list[Tensor]], program: "type[Program]"
) -> list[Tensor]:
    """The feature maps of a frozen backbone.

    Args:
        model: the backbone.
        images: (B, 3, H, W).
        plain: computes the same from the images with Paddle's operators; used where oneDNN cannot be, in training
            mode, for gradients of the images, and where somebody listens to the layers in between.
        program: the kind that such a model needs.
    """
    wants_gradient = paddle.is_grad_enabled() and not images.stop_gradient
    if (
        model.training
        or wants_gradient
        or _has_hooks(model)
        or not usable(images, *model.parameters(), *model.buffers())
    ):
        return plain(images)
    with LOCK:
        try:
            return _programs.setdefault(model, _Programs(program))(model, images.contiguous())
        except Unavailable:  # no fast kernel for this network or size on this CPU
            return plain(images)


def without_batch_norms(model: nn.Layer) -> nn.Layer:
    """A copy of a frozen network of the blocks that `PAIRS` knows, its BatchNorms folded into its convolutions."""
    model = copy.deepcopy(model)
    for layer in model.sublayers(include_self=True):
        for conv_name, bn_name in pairs(layer):
            conv, bn = getattr(layer, conv_name), getattr(layer, bn_name)
            if not isinstance(bn, nn.BatchNorm2D):  # a norm of another kind stays
                continue
            weights, bias = _fold(conv, bn)
            conv.weight.set_value(weights)
            conv.bias = conv.create_parameter(bias.shape, is_bias=True)
            conv.bias.set_value(bias)
            setattr(layer, bn_name, nn.Identity())
    return model


def pairs(layer: nn.Layer) -> list[tuple[str, str]]:
    """Those of `PAIRS` that a layer has itself."""
    return [names for names in PAIRS if isinstance(getattr(layer, names[0], None), nn.Conv2D)]


def _fold(conv: nn.Conv2D, bn: nn.BatchNorm2D) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of the convolution that does what both do; see the formula above."""
    gain = bn.weight.numpy() / np.sqrt(bn._variance.numpy() + bn._epsilon)  # (C)
    shift = bn._mean.numpy() if conv.bias is None else bn._mean.numpy() - conv.bias.numpy()
    return conv.weight.numpy() * gain[:, None, None, None], bn.bias.numpy() - gain * shift


def _has_hooks(model: nn.Layer) -> bool:
    return any(layer._forward_pre_hooks or layer._forward_post_hooks for layer in model.sublayers())


class _Programs:
    """A model's programs; made anew when its weights have changed."""

    def __init__(self, program: "type[Program]") -> None:
        self._program_of = program
        self._checksum: list[bytes] = []
        self._programs: dict[tuple[int, ...], Program] = {}

    def __call__(self, model: nn.Layer, images: Tensor) -> list[Tensor]:
        checksum = _checksum(model)
        if checksum != self._checksum:
            self._checksum = checksum
            self._programs.clear()
        _, _, h, w = images.shape
        source, results = Buffer.of(images).array, None
        for start in range(0, len(source), CHUNK):
            chunk = source[start : start + CHUNK]
            program = self._program(model, len(chunk), h, w)
            if results is None:
                results = [paddle.empty([len(source), *shape[1:]], "float32") for shape in program.shapes]
                arrays = [Buffer.of(tensor).array for tensor in results]
            program(chunk, [array[start : start + CHUNK] for array in arrays])
        return results

    def _program(self, model: nn.Layer, b: int, h: int, w: int) -> "Program":
        if (b, h, w) not in self._programs:
            if len(self._programs) == PROGRAMS:
                del self._programs[next(iter(self._programs))]  # the oldest
            self._programs[b, h, w] = self._program_of(model, b, h, w)
        return self._programs[b, h, w]


_programs: weakref.WeakKeyDictionary[nn.Layer, _Programs] = weakref.WeakKeyDictionary()


def _checksum(model: nn.Layer) -> list[bytes]:
    """Return a checksum of each tensor of weights; it takes a millisecond for ResNet18.

    Paddle counts some in-place changes, but not those of `set_value` and `set_state_dict`.
    """
    return [_sums(Buffer.of(tensor).array.ravel()) for tensor in (*model.parameters(), *model.buffers())]


def _sums(numbers: np.ndarray) -> bytes:
    """Return the sums of the bits of all pairs of numbers that are a multiple of `APART` pairs from each other.

    One sum of all would not change with numbers that change places, as when red and blue are exchanged.
    """
    pairs = numbers.view(np.uint32 if numbers.size % 2 else np.uint64)
    rows, rest = divmod(pairs.size, APART)
    if not rows:
        return pairs.tobytes()
    sums = pairs[: rows * APART].reshape(rows, APART).sum(0, dtype=np.uint64)
    sums[:rest] += pairs[rows * APART :]
    return sums.tobytes()


class Program:
    """A network for b images of one size, as calls of primitives on buffers of its own; a subclass makes the calls."""

    def __init__(self, b: int, h: int, w: int) -> None:
        self._memory: dict[tuple[int, int], Buffer] = {}
        self._outputs: list[tuple[int, Primitive, Buffer]] = []  # after how many calls, and how, a feature map leaves
        self.calls: list[tuple[Callable[..., None], list[Buffer]]] = []
        self.shapes: list[tuple[int, ...]] = []  # of the feature maps, (b, C, h, w)
        shape = (b, 3, h, w)
        self._enter = reorder(Layout.dense(shape), Layout.channels_last(shape))
        self.images = self.buffer(0, shape)

    def __call__(self, images: np.ndarray, results: Sequence[np.ndarray]) -> None:
        """Images (b, 3, h, w) -> the feature maps, written into `results`."""
        self._enter(Buffer(images), self.images)
        done = 0
        for (count, leave, x), result in zip(self._outputs, results, strict=True):
            for call, buffers in self.calls[done:count]:
                call(*buffers)
            done = count
            leave(x, Buffer(result))

    def leave(self, x: Buffer, shape: tuple[int, ...]) -> None:
        """Let x, as it is after the calls so far, be the next feature map."""
        leave = reorder(Layout.channels_last(shape), Layout.dense(shape))
        self._outputs.append((len(self.calls), leave, x))
        self.shapes.append(shape)

    def convolve(
        self,
        conv: nn.Conv2D,
        bn: nn.BatchNorm2D,
        x: Buffer,
        shape: tuple[int, ...],
        to: int = 0,
        activation: Sequence[float] = (),
        add_to: Buffer | None = None,
        padding: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[Buffer, tuple[int, ...]]:
        """Append convolution and BatchNorm of x into slot `to`, or added to what a buffer holds.

        Args:
            conv: the convolution.
            bn: the norm after it.
            x: what it takes.
            shape: of x, (b, C, h, w).
            to: the slot of the result.
            activation: of `PostOps.eltwise`; none if it is empty.
            add_to: what the result is added to, in the place of `to`.
            padding: see `Convolution`.

        Returns:
            the result and its shape.
        """
        if conv._dilation != [1, 1] or conv.bias is not None:
            raise Unavailable("a convolution with dilation or bias")
        post_ops = PostOps()
        if add_to is not None:
            post_ops.sum()
        if activation:
            post_ops.eltwise(*activation)
        weights, bias = _fold(conv, bn)
        stride, groups = conv._stride[0], conv._groups
        if groups == 1 and padding is None:
            form = convolution(shape, weights.shape, stride, post_ops=post_ops)
        else:
            o, *rest = weights.shape
            grouped = weights.shape if groups == 1 else (groups, o // groups, *rest)
            form = Convolution(shape, grouped, stride, padding, post_ops)
        result = add_to or self.buffer(to, form.dst)
        self.calls.append((form, [x, form.packed(weights), Buffer(bias), result]))
        return result, form.dst

    def buffer(self, slot: int, shape: tuple[int, ...]) -> Buffer:
        """Memory of a slot for activations of a shape; the same one each time it is asked for."""
        b, c, h, w = shape
        key = slot, b * c * h * w
        if key not in self._memory:
            self._memory[key] = Buffer.empty(b, h, w, c)
        return self._memory[key]
