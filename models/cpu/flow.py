"""Flows on the CPU, each as one operation on oneDNN: the numbers of the plain form in `models.fastflow`, sooner.

A flow goes through all its steps channels-last, a few images at a time, so that what a step touches stays in the
CPU's cache; the backward pass is written out. The halves of x, and those of y, are two dense arrays in one stack.
With a coupling and its subnet written as

    h = relu(conv1(condition)),   s = tanh(0.1 a),   out = target exp(clamp s) + 0.1 t,   [a, t] = conv2(h)

conv2 is two convolutions here, because their results go different ways: the one for 2a ends with the tanh, the one for
t adds itself to the product that `out` already holds. The factors 0.2 and 0.1 are in their weights. Scale, offset and
permutation are one convolution down the stack of the two halves, whose kernel has one number other than 0 per output.

In mixed precision the subnet's convolutions, forward and backward, take condition, hidden values, weights and the
gradients that reach them in bfloat16; they add up in float32, and all the rest is float32: x, y, s, log-det, the
gradients of the parameters.

Who owns what: `_Forward` and `_Backward` own the primitives for one shape and the scratch memory of those, `_Ends` what
leads in and out. A `_Tape` holds the activations for as long as Paddle keeps the graph; then the next one takes them.
All of it is in the `_Resources` of a flow and goes with the flow; what belongs to the shapes least recently used goes
before. One lock guards all of it.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from models.cpu.convolutions import LOCK, AnyWeightsGradient, convolution, unavailable, weights_gradient
from models.cpu.onednn import (
    ADD,
    BF16,
    EXP,
    F32,
    LINEAR,
    MUL,
    RELU,
    RELU_OF_DST,
    TANH_OF_DST,
    Buffer,
    Convolution,
    Layout,
    PostOps,
    Unavailable,
    channel_sums,
    eltwise_gradient,
    multiply,
    reorder,
)

# Numbers of a feature map, (images, C, H, W), that go through the flow together: 4 MB. Measured at batch 8 on two cores
# with 1 MB of second level cache each: down to a quarter as fast, at twice as much 8% slower.
CHUNK = 2**20
# For how many shapes a flow keeps what it has made: with two kernels, and with three numbers of images (a whole chunk,
# the rest of a batch and that of the last one) in training and in evaluation.
SHAPES = 12


def usable(*tensors: Tensor) -> bool:
    """Whether oneDNN can take them: float32 on the CPU, computed now and not traced for a static graph."""
    return (
        paddle.in_dynamic_mode()
        and all(t.place.is_cpu_place() and t.dtype == paddle.float32 and t.size for t in tensors)
        and unavailable() is None
    )


def flow(
    x: Tensor, steps: nn.LayerList, plain: Callable[[Tensor], tuple[Tensor, Tensor]], training: bool
) -> tuple[Tensor, Tensor]:
    """Run a flow's steps: (B, C, H, W) -> z (B, C, H, W), log-det (B).

    Args:
        x: the features.
        steps: `models.fastflow.FlowStep`s; what is made for them lives as long as this list.
        plain: computes the same from x with Paddle's operators; used where oneDNN cannot be, and for every gradient
            but that of a loss in training. Paddle 3.3 runs the backward pass of a PyLayer once only, for all its
            inputs, and crashes on `retain_graph`; gradients in eval mode, or of an x that is a variable itself,
            are for looking at the model and may be asked for in any way.
        training: whether the flow is in training mode, in which the subnets' `training_dtype` counts.
    """
    parameters = [p for step in steps for p in _parameters(step)]
    if not usable(x, *parameters):
        return plain(x)
    wants_gradients = paddle.is_grad_enabled() and not all(t.stop_gradient for t in (x, *parameters))
    if wants_gradients and (not training or (x.is_leaf and not x.stop_gradient)):
        return plain(x)
    constants = [(step.permutation.numpy(), step.clamp) for step in steps]
    kind = BF16 if training and steps[0].subnet.training_dtype == "bfloat16" else F32
    with LOCK:
        resources = _resources.setdefault(steps, _Resources())
    try:
        if wants_gradients:
            return _Flow.apply(x, *parameters, constants=constants, kind=kind, resources=resources)
        z, log_det, _ = _forward(x, _steps(parameters, constants), kind, resources, keep=False)
        return z, log_det
    except Unavailable:  # no fast kernel for this shape on this CPU
        return plain(x)


def _parameters(step: nn.Layer) -> list[Tensor]:
    convolutions = [conv for subnet in step.subnets for conv in (subnet[0], subnet[2])]
    return [step.global_scale, step.global_offset, *(p for conv in convolutions for p in (conv.weight, conv.bias))]


def _read_again(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return those that the gradients depend on, of what `_parameters` gives for steps: all but offsets and biases."""
    return parameters[::2]


class _Subnet(NamedTuple):
    """A subnet's numbers; the arrays are views of the parameters."""

    w1: np.ndarray  # (hidden, C/2, k, k)
    b1: np.ndarray  # (hidden)
    w2: np.ndarray  # (C, hidden, k, k)
    b2: np.ndarray  # (C)


class _Step(NamedTuple):
    """A step's numbers; the arrays are views of the parameters."""

    scale: np.ndarray  # (C)
    offset: np.ndarray  # (C)
    subnets: list[_Subnet]  # the one of both couplings, or that of each
    permutation: np.ndarray  # (C)
    clamp: float

    @property
    def kernel(self) -> int:
        """Side of the convolutions' kernels."""
        return self.subnets[0].w1.shape[-1]

    def mixing(self) -> np.ndarray:
        """(C, C) such that permute(y scale) = y @ mixing, for y (pixels, C)."""
        matrix = np.zeros((self.scale.size, self.scale.size), np.float32)
        matrix[self.permutation, np.arange(self.scale.size)] = self.scale[self.permutation]
        return matrix


def _steps(parameters: Sequence[Tensor], constants: Sequence[tuple[np.ndarray, float]]) -> list[_Step]:
    views = [Buffer.of(p).array for p in parameters]
    each = len(views) // len(constants)
    steps = []
    for i, constant in enumerate(constants):
        scale, offset, *others = views[i * each : (i + 1) * each]
        subnets = [_Subnet(*others[start : start + 4]) for start in range(0, len(others), 4)]
        steps.append(_Step(scale.ravel(), offset.ravel(), subnets, *constant))
    return steps


class _Flow(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor, constants, kind, resources) -> tuple[Tensor, Tensor]:
        z, log_det, ctx.tapes = _forward(x, _steps(parameters, constants), kind, resources, keep=True)
        ctx.constants, ctx.kind, ctx.resources = constants, kind, resources
        ctx.versions = [p.inplace_version for p in _read_again(parameters)]
        ctx.save_for_backward(x, *parameters)
        return z, log_det

    @staticmethod
    def backward(ctx, z_gradient: Tensor, log_det_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if paddle.is_grad_enabled():
            raise RuntimeError("create_graph=True: put the flow into eval mode for gradients of gradients")
        x, *parameters = ctx.saved_tensor()
        for parameter, version in zip(_read_again(parameters), ctx.versions, strict=True):
            if parameter.inplace_version != version:
                raise RuntimeError(  # in Paddle's words; it makes an OSError of what is raised here
                    f"Tensor '{parameter.name}' used in gradient computation has been modified by an inplace "
                    f"operation. Its version is {parameter.inplace_version} but the expected version is {version}."
                )
        steps = _steps(parameters, ctx.constants)
        gradients = _backward(ctx.tapes, steps, ctx.kind, ctx.resources, z_gradient, log_det_gradient)
        return tuple(None if t.stop_gradient else g for t, g in zip((x, *parameters), gradients, strict=True))


class _Stack:
    """The two halves of the channels of b images, channels-last, one after the other."""

    def __init__(self, b: int, half: int, h: int, w: int) -> None:
        self.whole = Buffer.empty(2, b, h, w, half)
        self.halves = self.whole[0], self.whole[1]


class _Activations:
    """What a step computes for b images and its backward pass needs again."""

    def __init__(self, b: int, half: int, hidden: int, h: int, w: int, kind: int) -> None:
        self.x = _Stack(b, half, h, w)
        self.y = _Stack(b, half, h, w)  # before scale, offset and permutation
        self.hidden = [Buffer.empty(b, h, w, hidden, kind=kind) for _ in range(2)]  # per use of the subnet
        self.tanh = [Buffer.empty(b, h, w, half) for _ in range(2)]


class _Narrowing:
    """Float32 of a size as a convolution of the kind takes it: itself, or in bfloat16 until the next call."""

    def __init__(self, size: int, kind: int) -> None:
        self._reorder = None
        if kind != F32:
            self._reorder = reorder(Layout.dense([size]), Layout.dense([size], kind))
            self._narrow = Buffer.empty(size, kind=kind)

    def __call__(self, buffer: Buffer) -> Buffer:
        if self._reorder is None:
            return buffer
        self._reorder(buffer, self._narrow)
        return self._narrow


class _Forward:
    """The primitives of a step's forward pass over b images, whose subnet computes with numbers of the kind."""

    def __init__(self, b: int, half: int, hidden: int, h: int, w: int, kind: int, kernel: int) -> None:
        self._images = b
        condition, inner = (b, half, h, w), (b, hidden, h, w)
        w1, w2 = (hidden, half, kernel, kernel), (half, hidden, kernel, kernel)
        self.narrow = _Narrowing(b * half * h * w, kind)
        self.conv1 = convolution(condition, w1, post_ops=PostOps().eltwise(RELU), kind=kind, dst_kind=kind)
        self.conv_a = convolution(inner, w2, post_ops=PostOps().tanh_of_half(), kind=kind)
        self.conv_t = convolution(inner, w2, post_ops=PostOps().sum(), kind=kind)
        flat = Layout.dense([b * half * h * w])
        # (s, clamp, out, target): out = exp(clamp s) target
        self.exp_times = multiply(flat, Layout.dense([1]), PostOps().eltwise(EXP).binary(MUL, flat))
        # an image of 2 rows, the halves, to one row
        self.mix = Convolution((1, half, 2, b * h * w), (half, half, 2, 1), padding=((0, 0), (0, 0)))

    def packed_mixing(self, matrix: np.ndarray) -> list[Buffer]:
        """(C, C), from channel to channel -> the weights for each half of the result."""
        half = len(matrix) // 2
        weights = matrix.reshape(2, half, 2, half).transpose(2, 3, 1, 0)  # (half to, to, from, half from)
        return [self.mix.packed(w[..., None]) for w in weights]

    def __call__(self, weights: "_ForwardWeights", memory: _Activations, to: _Stack) -> np.ndarray:
        """memory.x -> `to`; returns the sum of s over channels and pixels, (b)."""
        (x1, x2), (y1, y2) = memory.x.halves, memory.y.halves
        total = 0.0
        uses = (0, x1, x2, y2), (-1, y2, x1, y1)
        for i, condition, target, out in uses:
            subnet = weights.subnets[i]
            self.conv1(self.narrow(condition), subnet.w1, subnet.b1, memory.hidden[i])
            self.conv_a(memory.hidden[i], subnet.wa, subnet.ba, memory.tanh[i])
            self.exp_times(memory.tanh[i], weights.clamp, out, target)
            self.conv_t(memory.hidden[i], subnet.wt, subnet.bt, out)
            total = total + memory.tanh[i].array.reshape(self._images, -1).sum(1)
        for weight, offset, half in zip(weights.mixing, weights.offset, to.halves, strict=True):
            self.mix(memory.y.whole, weight, offset, half)
        return total


class _ForwardSubnet:
    """A subnet's parameters as `_Forward` takes them."""

    def __init__(self, kernels: _Forward, subnet: _Subnet) -> None:
        half = len(subnet.w2) // 2
        self.w1, self.b1 = kernels.conv1.packed(subnet.w1), Buffer(subnet.b1)
        self.wa, self.ba = kernels.conv_a.packed(0.2 * subnet.w2[:half]), Buffer(0.2 * subnet.b2[:half])
        self.wt, self.bt = kernels.conv_t.packed(0.1 * subnet.w2[half:]), Buffer(0.1 * subnet.b2[half:])


class _ForwardWeights:
    """A step's parameters as `_Forward` takes them."""

    def __init__(self, kernels: _Forward, step: _Step) -> None:
        self.subnets = [_ForwardSubnet(kernels, subnet) for subnet in step.subnets]
        self.mixing = kernels.packed_mixing(step.mixing())
        self.offset = [Buffer(half) for half in np.split(step.offset[step.permutation], 2)]
        self.clamp = Buffer(np.full(1, step.clamp, np.float32))


class _Backward:
    """The primitives of a step's backward pass over b images, and the scratch memory they share."""

    def __init__(self, b: int, half: int, hidden: int, h: int, w: int, kind: int, kernel: int, clamp: float) -> None:
        condition, inner = (b, half, h, w), (b, hidden, h, w)
        w1, w2 = (hidden, half, kernel, kernel), (half, hidden, kernel, kernel)
        self.w1_gradient = weights_gradient(condition, w1, kind)
        self.w2_gradient = weights_gradient(inner, w2, kind)
        self.conv_a_adjoint = convolution(condition, w1, kind=kind, dst_kind=kind)
        self.conv_t_adjoint = convolution(condition, w1, post_ops=PostOps().sum(), kind=kind, dst_kind=kind)
        self.conv1_adjoint = convolution(inner, w2, post_ops=PostOps().sum(), kind=kind)
        self.relu_gradient = eltwise_gradient(RELU_OF_DST, b * hidden * h * w, kind)
        self.tanh_gradient = eltwise_gradient(TANH_OF_DST, b * half * h * w)
        # (gradient of target, target, gradient of s, gradient of log-det): the third is clamp (first second + fourth)
        images, each = Layout.dense([1, b, half * h * w]), Layout.dense([1, b, 1])
        self.s_gradient = multiply(images, images, PostOps().binary(ADD, each).eltwise(LINEAR, clamp, 0))
        self.y = _Stack(b, half, h, w)
        self.a = Buffer.empty(b, h, w, half)
        self.hidden = Buffer.empty(b, h, w, hidden, kind=kind)
        self.no_bias = Buffer(np.zeros(max(half, hidden), np.float32))
        # written by each call of a weights' gradient, then added to the sums
        self.w1, self.b1 = Buffer.empty(self.w1_gradient.size), Buffer.empty(hidden)
        self.w2, self.b2 = Buffer.empty(self.w2_gradient.size), Buffer.empty(half)

    def __call__(
        self,
        forward: _Forward,
        weights: "_BackwardWeights",
        memory: _Activations,
        g: _Stack,
        log_det_gradient: Buffer,  # (b)
        sums: "_Sums",
    ) -> None:
        """Replace the gradient of the step's result, in g, by that of its x; add its parameters' to the sums."""
        for weight, half in zip(weights.unmixing, self.y.halves, strict=True):
            forward.mix(g.whole, weight, self.no_bias, half)
        gy, y = self.y.whole.array, memory.y.whole.array
        sums.scale += channel_sums(gy, y).ravel()
        sums.offset += channel_sums(gy).ravel()
        (x1, x2), (_, y2) = memory.x.halves, memory.y.halves
        (gx1, gx2), (gy1, gy2) = g.halves, self.y.halves
        # the second coupling first: it gives gy2 its other part
        uses = (-1, y2, x1, gy1, gx1, gy2), (0, x1, x2, gy2, gx2, gx1)
        for i, condition, target, g_out, g_target, g_condition in uses:
            s, hidden, subnet, sum_ = memory.tanh[i], memory.hidden[i], weights.subnets[i], sums.subnets[i]
            forward.exp_times(s, weights.clamp, g_target, g_out)
            self.s_gradient(g_target, target, self.a, log_det_gradient)
            self.tanh_gradient(s, self.a, self.a)
            narrow = forward.narrow(self.a)
            self._add(self.w2_gradient, hidden, narrow, self.w2, self.b2, sum_.wa, sum_.ba)
            self.conv_a_adjoint(narrow, subnet.wa, self.no_bias, self.hidden)
            narrow = forward.narrow(g_out)
            self._add(self.w2_gradient, hidden, narrow, self.w2, self.b2, sum_.wt, sum_.bt)
            self.conv_t_adjoint(narrow, subnet.wt, self.no_bias, self.hidden)
            self.relu_gradient(hidden, self.hidden, self.hidden)
            narrow = forward.narrow(condition)
            self._add(self.w1_gradient, narrow, self.hidden, self.w1, self.b1, sum_.w1, sum_.b1)
            self.conv1_adjoint(self.hidden, subnet.w1, self.no_bias, g_condition)

    @staticmethod
    def _add(
        gradient: AnyWeightsGradient,
        src: Buffer,
        g: Buffer,
        w: Buffer,
        b: Buffer,
        w_sum: np.ndarray,
        b_sum: np.ndarray,
    ) -> None:
        gradient(src, g, w, b)
        w_sum += w.array
        b_sum += b.array


class _BackwardSubnet:
    """A subnet's parameters as `_Backward` takes them."""

    def __init__(self, kernels: _Backward, subnet: _Subnet) -> None:
        wa, wt = np.split(0.1 * subnet.w2, 2)
        self.w1 = kernels.conv1_adjoint.packed_adjoint(subnet.w1)
        self.wa, self.wt = kernels.conv_a_adjoint.packed_adjoint(wa), kernels.conv_t_adjoint.packed_adjoint(wt)


class _BackwardWeights:
    """A step's parameters as `_Backward` takes them."""

    def __init__(self, forward: _Forward, kernels: _Backward, step: _Step) -> None:
        self.subnets = [_BackwardSubnet(kernels, subnet) for subnet in step.subnets]
        self.unmixing = forward.packed_mixing(step.mixing().T)
        self.clamp = Buffer(np.full(1, step.clamp, np.float32))


class _SubnetSums:
    """Gradients of a subnet's parameters, summed over images and, if both couplings share it, over these."""

    def __init__(self, kernels: _Backward) -> None:
        self._kernels = kernels
        w1, b1, w2, b2 = (buffer.array.size for buffer in (kernels.w1, kernels.b1, kernels.w2, kernels.b2))
        self.w1, self.b1, self.wa, self.ba, self.wt, self.bt = (
            np.zeros(size, np.float32) for size in (w1, b1, w2, b2, w2, b2)
        )

    def gradients(self) -> list[np.ndarray]:
        """In the order and shape of the parameters."""
        unpacked = self._kernels.w2_gradient.unpacked
        return [
            self._kernels.w1_gradient.unpacked(self.w1),
            self.b1,
            0.1 * np.concatenate([unpacked(self.wa), unpacked(self.wt)]),
            0.1 * np.concatenate([self.ba, self.bt]),
        ]


class _Sums:
    """Gradients of a step's parameters, summed over images."""

    def __init__(self, kernels: _Backward, step: _Step) -> None:
        self.subnets = [_SubnetSums(kernels) for _ in step.subnets]
        self.scale, self.offset = np.zeros((2, step.scale.size), np.float32)

    def gradients(self) -> list[np.ndarray]:
        """In the order and shape of the parameters; those of scale and offset still have the factor scale."""
        of_subnets = [gradient for sums in self.subnets for gradient in sums.gradients()]
        return [self.scale.reshape(1, -1, 1, 1), self.offset.reshape(1, -1, 1, 1), *of_subnets]


class _Ends:
    """Between Paddle's tensors (b, C, H, W) and stacks, and the stack to begin or end with."""

    def __init__(self, b: int, half: int, h: int, w: int) -> None:
        channels_first = Layout.strided((b, half, h, w), (2 * half * h * w, h * w, w, 1))  # half of a tensor
        channels_last = Layout.channels_last((b, half, h, w))
        self._split, self._join = reorder(channels_first, channels_last), reorder(channels_last, channels_first)
        self._half = half
        self.stack = _Stack(b, half, h, w)

    def split(self, images: np.ndarray, stack: _Stack) -> None:
        for i, half in enumerate(stack.halves):
            self._split(Buffer(images[:, i * self._half :]), half)

    def join(self, stack: _Stack, images: np.ndarray) -> None:
        for i, half in enumerate(stack.halves):
            self._join(half, Buffer(images[:, i * self._half :]))


class _Resources:
    """This holds what has been made for a flow, by shape: primitives, ends, and activations that are not in use."""

    def __init__(self) -> None:
        remembered = functools.lru_cache(maxsize=SHAPES)
        self.forward, self.backward, self.ends = (remembered(kind) for kind in (_Forward, _Backward, _Ends))
        self.free_activations = remembered(lambda *_: [])


_resources: weakref.WeakKeyDictionary[nn.LayerList, _Resources] = weakref.WeakKeyDictionary()


class _Tape:
    """The activations of a chunk of images at each step; lent until the tape goes, with Paddle's graph.

    Without `keep`, steps of one shape share theirs: each overwrites the last one's.
    """

    def __init__(self, resources: _Resources, shapes: Sequence[tuple[int, ...]], keep: bool) -> None:
        self._free = resources.free_activations
        self._lent: dict[tuple[int, ...], _Activations] = {}
        self.steps = []
        for i, shape in enumerate(shapes):
            key = (i if keep else 0, *shape)
            if key not in self._lent:
                free = self._free(*shape)
                self._lent[key] = free.pop() if free else _Activations(*shape)
            self.steps.append(self._lent[key])

    def __del__(self) -> None:
        for (_, *shape), activations in self._lent.items():
            self._free(*shape).append(activations)


def _chunks(shape: Sequence[int]) -> Iterator[slice]:
    """The images (B, C, H, W) that go together; all chunks but the last have the same length."""
    b, c, h, w = shape
    length = max(1, CHUNK // (c * h * w))
    return (slice(start, min(start + length, b)) for start in range(0, b, length))


def _forward(
    x: Tensor, steps: Sequence[_Step], kind: int, resources: _Resources, keep: bool
) -> tuple[Tensor, Tensor, list[_Tape]]:
    """z (B, C, H, W), log-det (B), and the tapes if they are to be kept."""
    x = x.contiguous()
    _, c, h, w = x.shape
    z = paddle.empty(x.shape, "float32")
    source, result = Buffer.of(x).array, Buffer.of(z).array
    with np.errstate(invalid="ignore", divide="ignore"):  # of a diverged scale; the training looks at the loss
        log_det = np.full(len(source), sum(h * w * np.log(step.scale).sum() for step in steps), np.float32)
    tapes, weights = [], {}
    with LOCK:
        for images in _chunks(x.shape):
            n = images.stop - images.start
            shapes = [_shape(n, step, h, w, kind) for step in steps]
            kernels = [resources.forward(*shape, step.kernel) for shape, step in zip(shapes, steps, strict=True)]
            if n not in weights:
                weights[n] = [_ForwardWeights(k, step) for k, step in zip(kernels, steps, strict=True)]
            tape = _Tape(resources, shapes, keep)
            ends = resources.ends(n, c // 2, h, w)
            ends.split(source[images], tape.steps[0].x)
            followers = [*(memory.x for memory in tape.steps[1:]), ends.stack]
            for kernel, weight, memory, to, step in zip(kernels, weights[n], tape.steps, followers, steps, strict=True):
                log_det[images] += step.clamp * kernel(weight, memory, to)
            ends.join(ends.stack, result[images])
            if keep:
                tapes.append(tape)
    return z, _tensor(log_det), tapes


def _backward(
    tapes: Sequence[_Tape],
    steps: Sequence[_Step],
    kind: int,
    resources: _Resources,
    z_gradient: Tensor,
    log_det_gradient: Tensor,
) -> list[Tensor]:
    """The gradients of x, and of each step's parameters in their order."""
    z_gradient = z_gradient.contiguous()
    _, c, h, w = z_gradient.shape
    x_gradient = paddle.empty(z_gradient.shape, "float32")
    source, result = Buffer.of(z_gradient).array, Buffer.of(x_gradient).array
    log_det = np.ascontiguousarray(log_det_gradient.numpy())
    weights, sums = {}, {}
    with LOCK:
        for images, tape in zip(_chunks(z_gradient.shape), tapes, strict=True):
            n = images.stop - images.start
            shapes = [(*_shape(n, step, h, w, kind), step.kernel) for step in steps]
            forward = [resources.forward(*shape) for shape in shapes]
            backward = [resources.backward(*shape, step.clamp) for shape, step in zip(shapes, steps, strict=True)]
            if n not in weights:
                weights[n] = [_BackwardWeights(*three) for three in zip(forward, backward, steps, strict=True)]
                sums[n] = [_Sums(*pair) for pair in zip(backward, steps, strict=True)]
            ends = resources.ends(n, c // 2, h, w)
            ends.split(source[images], ends.stack)
            each = Buffer(log_det[images])
            for i in reversed(range(len(steps))):
                backward[i](forward[i], weights[n][i], tape.steps[i], ends.stack, each, sums[n][i])
            ends.join(ends.stack, result[images])
        gradients = [x_gradient]
        for i, step in enumerate(steps):
            of_all_sizes = [of_size[i].gradients() for of_size in sums.values()]
            scale, offset, *others = (sum(arrays) for arrays in zip(*of_all_sizes, strict=True))
            factor = step.scale.reshape(1, -1, 1, 1)
            log_det_part = h * w * log_det.sum()  # log-det has H W sum(log scale)
            gradients += map(_tensor, [(scale + log_det_part) / factor, offset / factor, *others])
    return gradients


def _shape(n: int, step: _Step, h: int, w: int, kind: int) -> tuple[int, int, int, int, int, int]:
    w1 = step.subnets[0].w1
    return n, w1.shape[1], len(w1), h, w, kind


def _tensor(array: np.ndarray) -> Tensor:
    """A new tensor with these numbers; `paddle.to_tensor` loses 100 bytes at each call (3.3.1)."""
    tensor = paddle.empty(array.shape, "float32")
    Buffer.of(tensor).array[...] = array
    return tensor
