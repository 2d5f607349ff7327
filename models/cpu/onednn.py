"""The oneDNN library that Paddle's wheel carries, called directly through ctypes; nothing is compiled.

Paddle's own CPU convolution reaches half of what oneDNN does on the same cores, and each pointwise operation is one
more pass over memory. `flow` and `features` beside it build the flows and the backbone from the primitives here.

* Layout: activations are channels-last, (B, H, W, C) in memory, dense. The library chooses the layout of weights, and
  a reorder packs Paddle's (O, I, kH, kW) into it. A reorder also leads from channels-first and back.
* Numbers: float32, F32, unless a `kind` says BF16. Convolutions take bfloat16 and add up in float32; numpy has no such
  type and holds it as the upper half of a float32's bits, in uint16.
* Ownership: a `Primitive` owns its handles, which are destroyed with it. It never owns data: a `Buffer` belongs to the
  caller and is only used during the call. The library's scratch memory is its own.
* Threads: oneDNN runs on the OpenMP threads that Paddle uses. A `Primitive` serves one caller at a time.
"""

import ctypes
import functools
import math
import platform
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

# dnnl_types.h of oneDNN 3; the values are part of its ABI
CPU, IN_ORDER, BF16, F32, ANY_LAYOUT = 1, 1, 2, 3, 1
TRAINING, INFERENCE, CONVOLUTION_DIRECT, POOLING_MAX = 64, 96, 1, 0x1FF
RELU, LINEAR, LOGISTIC, EXP, CLIP, RELU_OF_DST, TANH_OF_DST = 0x20, 0x26, 0x29, 0x2A, 0x2E, 0x100, 0x101
ADD, MUL = 0x1FFF0, 0x1FFF1
SRC, SRC_1, DST, WEIGHTS, BIAS = 1, 2, 17, 33, 41
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, POST_OP = 129, 145, 161, 169, 32768
QUERY_IMPLEMENTATION, QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 8, 131, 132

MEMORY = {F32: np.float32, BF16: np.uint16}  # how numpy holds them

# Every function used and the types of its arguments; all but the two in RESULTS return a status, 0 for success.
H = c_void_p  # a handle, an array of dimensions, or a pointer to data
NEW = POINTER(c_void_p)  # where a new handle goes
SIGNATURES = {
    "dnnl_engine_create": [NEW, c_int, c_size_t],
    "dnnl_stream_create": [NEW, H, c_int],
    "dnnl_memory_desc_create_with_tag": [NEW, c_int, H, c_int, c_int],
    "dnnl_memory_desc_create_with_strides": [NEW, c_int, H, c_int, H],
    "dnnl_memory_desc_clone": [NEW, H],
    "dnnl_memory_desc_get_size": [H],
    "dnnl_memory_desc_destroy": [H],
    "dnnl_memory_create": [NEW, H, H, H],
    "dnnl_memory_set_data_handle": [H, H],
    "dnnl_memory_destroy": [H],
    "dnnl_post_ops_create": [NEW],
    "dnnl_post_ops_append_sum": [H, c_float, c_int, c_int],
    "dnnl_post_ops_append_eltwise": [H, c_int, c_float, c_float],
    "dnnl_post_ops_append_binary": [H, c_int, H],
    "dnnl_post_ops_destroy": [H],
    "dnnl_primitive_attr_create": [NEW],
    "dnnl_primitive_attr_set_post_ops": [H, H],
    "dnnl_primitive_attr_destroy": [H],
    "dnnl_convolution_forward_primitive_desc_create": [NEW, H, c_int, c_int, H, H, H, H, H, H, H, H, H],
    "dnnl_convolution_backward_weights_primitive_desc_create": [NEW, H, c_int, H, H, H, H, H, H, H, H, H, H],
    "dnnl_eltwise_forward_primitive_desc_create": [NEW, H, c_int, c_int, H, H, c_float, c_float, H],
    "dnnl_eltwise_backward_primitive_desc_create": [NEW, H, c_int, H, H, H, c_float, c_float, H, H],
    "dnnl_binary_primitive_desc_create": [NEW, H, c_int, H, H, H, H],
    "dnnl_matmul_primitive_desc_create": [NEW, H, H, H, H, H, H],
    "dnnl_pooling_forward_primitive_desc_create": [NEW, H, c_int, c_int, H, H, H, H, H, H, H, H],
    "dnnl_reorder_primitive_desc_create": [NEW, H, H, H, H, H],
    "dnnl_primitive_desc_query": [H, c_int, c_int, H],
    "dnnl_primitive_desc_query_md": [H, c_int, c_int],
    "dnnl_primitive_desc_destroy": [H],
    "dnnl_primitive_create": [NEW, H],
    "dnnl_primitive_execute": [H, H, c_int, H],
    "dnnl_primitive_destroy": [H],
}
RESULTS = {"dnnl_memory_desc_get_size": c_size_t, "dnnl_primitive_desc_query_md": c_void_p}


class Unavailable(Exception):
    """oneDNN cannot be used, or not for these shapes; the message says why."""


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class _Argument(ctypes.Structure):
    _fields_ = [("index", c_int), ("memory", c_void_p)]


class Library:
    """The loaded library, its CPU engine and its stream; they live as long as the process."""

    def __init__(self, path: Path) -> None:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
            raise Unavailable(f"no support for {platform.system()} on {platform.machine()}")
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._library.dnnl_version
            version.restype = POINTER(_Version)
            found = version().contents
            self.version = f"{found.major}.{found.minor}.{found.patch}"
            if found.major != 3:
                raise Unavailable(f"{path.name} is oneDNN {self.version}, not 3.x")
            for name, arguments in SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes = arguments
                function.restype = RESULTS.get(name, c_int)
                setattr(self, name, function)
        except (OSError, AttributeError) as error:  # no such file; no such symbol
            raise Unavailable(f"{path.name}: {error}") from error
        self.engine = self.create("dnnl_engine", CPU, 0)
        self.stream = self.create("dnnl_stream", self.engine, IN_ORDER)

    def call(self, name: str, *arguments) -> None:
        """Call a function that returns a status.

        Raises:
            Unavailable: the status is not that of success.
        """
        code = getattr(self, name)(*arguments)
        if code:
            raise Unavailable(f"{name}: status {code}")

    def create(self, kind: str, *arguments, constructor: str = "_create") -> c_void_p:
        """A new handle from `<kind><constructor>`, which the caller destroys."""
        handle = c_void_p()
        self.call(kind + constructor, byref(handle), *arguments)
        return handle


@functools.cache
def library() -> Library:
    """Paddle's own copy, loaded once."""
    return Library(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3")


class Handle:
    """A oneDNN object; destroyed when nothing refers to it any more."""

    def __init__(self, kind: str, *arguments, constructor: str = "_create") -> None:
        self.value = library().create(kind, *arguments, constructor=constructor)
        kind = "dnnl_primitive_desc" if kind.endswith("primitive_desc") else kind
        weakref.finalize(self, getattr(library(), kind + "_destroy"), self.value).atexit = False


class Layout:
    """A memory descriptor: dimensions in oneDNN's order, (B, C, H, W), where each element lies, and its kind."""

    def __init__(self, *arguments, constructor: str, kind: int) -> None:
        self._handle = Handle("dnnl_memory_desc", *arguments, constructor=constructor)
        self.value = self._handle.value
        self.kind = kind
        self.size = library().dnnl_memory_desc_get_size(self.value) // np.dtype(MEMORY[kind]).itemsize  # elements

    @classmethod
    def strided(cls, shape: Sequence[int], strides: Sequence[int], kind: int = F32) -> "Layout":
        """Strides count elements."""
        return cls(len(shape), _dims(shape), kind, _dims(strides), constructor="_create_with_strides", kind=kind)

    @classmethod
    def dense(cls, shape: Sequence[int], kind: int = F32) -> "Layout":
        """The order of numpy and Paddle: neighbours in the last dimension are neighbours in memory."""
        return cls.strided(shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))], kind)

    @classmethod
    def channels_last(cls, shape: Sequence[int], kind: int = F32) -> "Layout":
        """(B, C, H, W) that lies in memory as (B, H, W, C)."""
        _, c, h, w = shape
        return cls.strided(shape, (h * w * c, 1, w * c, c), kind)

    @classmethod
    def any(cls, shape: Sequence[int], kind: int = F32) -> "Layout":
        """The library chooses when it makes a primitive."""
        return cls(len(shape), _dims(shape), kind, ANY_LAYOUT, constructor="_create_with_tag", kind=kind)

    @classmethod
    def chosen(cls, description: Handle, query: int, kind: int = F32) -> "Layout":
        """What the library chose."""
        chosen = library().dnnl_primitive_desc_query_md(description.value, query, 0)
        return cls(chosen, constructor="_clone", kind=kind)


class Buffer:
    """Memory; `array` is what keeps it alive."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.address = array.ctypes.data

    @classmethod
    def empty(cls, *shape: int, kind: int = F32) -> "Buffer":
        """New memory that begins on a cache line of 64 bytes."""
        size = math.prod(shape)
        memory = np.empty(size + 32, MEMORY[kind])
        start = -memory.ctypes.data % 64 // memory.itemsize
        return cls(memory[start : start + size].reshape(shape))

    @classmethod
    def of(cls, tensor: Tensor) -> "Buffer":
        """The memory of a contiguous float32 CPU tensor itself; the caller keeps the tensor."""
        memory = (c_float * math.prod(tensor.shape)).from_address(tensor.data_ptr())
        return cls(np.ctypeslib.as_array(memory).reshape(tensor.shape))

    def __getitem__(self, index: int | slice) -> "Buffer":
        return Buffer(self.array[index])


class Primitive:
    """One compiled operation; call it with a Buffer for each argument."""

    def __init__(self, description: Handle, arguments: dict[int, Layout]) -> None:
        lib = library()
        name = c_char_p()
        lib.call("dnnl_primitive_desc_query", description.value, QUERY_IMPLEMENTATION, 0, byref(name))
        self.implementation = name.value.decode()
        # correct, but a reference kernel is a hundred times slower, and one without AVX slower than Paddle's
        if self.implementation.startswith("ref") or "sse" in self.implementation:
            raise Unavailable(f"no fast kernel for this CPU, only {self.implementation}")
        self._primitive = Handle("dnnl_primitive", description.value)
        self._memories = [Handle("dnnl_memory", layout.value, lib.engine, None) for layout in arguments.values()]
        pairs = [(index, memory.value) for index, memory in zip(arguments, self._memories, strict=True)]
        self._arguments = (_Argument * len(pairs))(*pairs)

    def __call__(self, *buffers: Buffer) -> None:
        lib, code = library(), 0
        for memory, buffer in zip(self._memories, buffers, strict=True):
            code = code or lib.dnnl_memory_set_data_handle(memory.value, buffer.address)
        code = code or lib.dnnl_primitive_execute(self._primitive.value, lib.stream, len(buffers), self._arguments)
        if code:
            raise RuntimeError(f"oneDNN {self.implementation}: status {code}")


class PostOps:
    """What a primitive does to a result before it writes it: `sum` adds what `dst` held, `eltwise` is a function of
    one number, `binary` takes another Buffer, which then is one more argument of the call."""

    def __init__(self) -> None:
        self._operations = Handle("dnnl_post_ops")
        self._count = 0
        self.arguments: dict[int, Layout] = {}

    def _append(self, kind: str, *arguments) -> None:
        library().call(f"dnnl_post_ops_append_{kind}", self._operations.value, *arguments)
        self._count += 1

    def sum(self) -> "PostOps":
        self._append("sum", 1, 0, 0)
        return self

    def eltwise(self, function: int, alpha: float = 0, beta: float = 0) -> "PostOps":
        self._append("eltwise", function, alpha, beta)
        return self

    def tanh_of_half(self) -> "PostOps":
        """x -> tanh(x / 2) = 2 logistic(x) - 1, with an error up to 2e-7.

        The library's tanh (5e-8) looks up tables: within a convolution it takes two to four times as long with AVX2;
        with AVX-512 they are alike.
        """
        return self.eltwise(LOGISTIC).eltwise(LINEAR, 2, -1)

    def binary(self, function: int, other: Layout) -> "PostOps":
        self._append("binary", function, other.value)
        self.arguments[POST_OP * self._count | SRC_1] = other
        return self

    def attributes(self) -> Handle:
        """The form in which a primitive takes them."""
        attributes = Handle("dnnl_primitive_attr")
        library().call("dnnl_primitive_attr_set_post_ops", attributes.value, self._operations.value)
        return attributes


def reorder(src: Layout, dst: Layout) -> Primitive:
    """(src, dst): the same elements where dst has them."""
    engine = library().engine
    description = Handle("dnnl_reorder_primitive_desc", src.value, engine, dst.value, engine, None)
    return Primitive(description, {SRC: src, DST: dst})


class Convolution(Primitive):
    """(src, weights, bias, dst): dst = post_ops(src * weights + bias), src and dst channels-last.

    The weights are `packed` (O, I, kH, kW), in the layout that the library chose; with groups of channels that do not
    see each other they are (groups, O, I, kH, kW), O and I counted in a group. The bias is float32.
    """

    def __init__(
        self,
        src: Sequence[int],  # (B, I, H, W)
        weights: Sequence[int],  # (O, I, kH, kW), before it the groups if there are any
        stride: int = 1,
        padding: Sequence[tuple[int, int]] | None = None,  # before and after H and W; default: they stay, at stride 1
        post_ops: PostOps | None = None,
        kind: int = F32,  # of src and weights
        dst_kind: int = F32,
    ) -> None:
        post_ops = post_ops or PostOps()
        arguments, geometry, self.dst = _convolution(src, weights, stride, padding, (kind, kind, dst_kind))
        attributes = post_ops.attributes()
        description = Handle(
            "dnnl_convolution_forward_primitive_desc",
            *(library().engine, TRAINING, CONVOLUTION_DIRECT),
            *(layout.value for layout in arguments),
            *geometry,
            attributes.value,
        )
        src_, _, bias, dst = arguments
        self.weights = Layout.chosen(description, QUERY_WEIGHTS, kind)
        super().__init__(description, {SRC: src_, WEIGHTS: self.weights, BIAS: bias, DST: dst} | post_ops.arguments)
        self._shape = tuple(weights)
        self._pack = reorder(Layout.dense(weights), self.weights)

    def packed(self, weights: np.ndarray) -> Buffer:
        """Weights (O, I, kH, kW) as a call takes them."""
        return _reordered(self._pack, weights, self.weights)

    def packed_adjoint(self, weights: np.ndarray) -> Buffer:
        """The weights that bring the gradient of dst back to src, of a convolution I -> O with stride 1.

        That is a convolution too, by the weights turned by 180 degrees and with I and O exchanged. oneDNN's own
        gradient is this one without post-ops; here `sum` adds it to what is there.
        """
        return _reordered(self._pack_transposed, turned(weights), self.weights)

    @functools.cached_property
    def _pack_transposed(self) -> Primitive:
        """From the same weights where (I, O, kH, kW) lies in memory; not for groups."""
        o, _, kh, kw = self._shape
        return reorder(Layout.strided(self._shape, (kh * kw, o * kh * kw, kw, 1)), self.weights)


def turned(weights: np.ndarray) -> np.ndarray:
    """Weights (O, I, kH, kW), each kernel by 180 degrees."""
    return weights.reshape(*weights.shape[:2], -1)[:, :, ::-1]


class WeightsGradient(Primitive):
    """(src, gradient of dst, of weights, of bias): of a Convolution with stride 1; overwrites the latter two.

    The gradient of the weights has a layout of the library's choice and `size` elements: `unpacked` is (O, I, kH, kW).
    `kind` is that of src and of the gradient of dst; the others are float32.
    """

    def __init__(self, src: Sequence[int], weights: Sequence[int], kind: int = F32) -> None:
        forward, geometry, _ = _convolution(src, weights, 1, None, (kind, kind, kind))
        # oneDNN asks for a forward description as a hint
        hint = Handle(
            "dnnl_convolution_forward_primitive_desc",
            *(library().engine, TRAINING, CONVOLUTION_DIRECT),
            *(layout.value for layout in forward),
            *geometry,
            None,
        )
        arguments, geometry, _ = _convolution(src, weights, 1, None, (kind, F32, kind))
        description = Handle(
            "dnnl_convolution_backward_weights_primitive_desc",
            *(library().engine, CONVOLUTION_DIRECT),
            *(layout.value for layout in arguments),
            *geometry,
            *(hint.value, None),
        )
        src_, _, bias, dst = arguments
        chosen = Layout.chosen(description, QUERY_DIFF_WEIGHTS)
        super().__init__(description, {SRC: src_, DIFF_DST: dst, DIFF_WEIGHTS: chosen, DIFF_BIAS: bias})
        self.size = chosen.size
        self._shape = tuple(weights)
        self._dense = Layout.dense(weights)
        self._unpack = reorder(chosen, self._dense)

    def unpacked(self, gradient: np.ndarray) -> np.ndarray:
        """Weights' gradients as this primitive writes them -> (O, I, kH, kW)."""
        return _reordered(self._unpack, gradient, self._dense).array.reshape(self._shape)


def matmul(src: Layout, weights: Layout, dst: Layout, post_ops: PostOps | None = None) -> Primitive:
    """(src, weights, dst): dst = post_ops(src @ weights), matrices in the last two dimensions."""
    attributes = (post_ops or PostOps()).attributes()
    layouts = (src.value, weights.value, None, dst.value)
    description = Handle("dnnl_matmul_primitive_desc", library().engine, *layouts, attributes.value)
    return Primitive(description, {SRC: src, WEIGHTS: weights, DST: dst})


def channel_sums(*arrays: np.ndarray) -> np.ndarray:
    """The sum over pixels of the product of one or two arrays (n, ..., C) -> (n, C).

    Many pixels are taken as one long row first, which numpy adds several times faster than short rows.
    """
    n, *_, c = arrays[0].shape
    pixels = arrays[0].size // n // c
    group = math.gcd(pixels, 64)
    rows = [a.reshape(n, pixels // group, group * c) for a in arrays]
    sums = np.einsum("ikn,ikn->in", *rows) if len(rows) == 2 else rows[0].sum(1)
    return sums.reshape(n, group, c).sum(1)


def eltwise_gradient(function: int, size: int, kind: int = F32) -> Primitive:
    """(dst, gradient of dst, gradient of src) for dst = function(src), one of RELU_OF_DST and TANH_OF_DST."""
    layout, engine = Layout.dense([size], kind), library().engine
    hint = Handle(
        "dnnl_eltwise_forward_primitive_desc",
        *(engine, TRAINING, function, layout.value, layout.value, 0, 0, None),
    )
    description = Handle(
        "dnnl_eltwise_backward_primitive_desc",
        *(engine, function, layout.value, layout.value, layout.value, 0, 0, hint.value, None),
    )
    return Primitive(description, {DST: layout, DIFF_DST: layout, DIFF_SRC: layout})


def multiply(src: Layout, other: Layout, post_ops: PostOps) -> Primitive:
    """(src, other, dst): dst = post_ops(src other); `other` may have dimensions of 1, which are repeated."""
    attributes = post_ops.attributes()
    description = Handle(
        "dnnl_binary_primitive_desc",
        *(library().engine, MUL, src.value, other.value, src.value, attributes.value),
    )
    return Primitive(description, {SRC: src, SRC_1: other, DST: src} | post_ops.arguments)


class MaxPool(Primitive):
    """(src, dst): the largest of each window, channels-last."""

    def __init__(self, src: Sequence[int], kernel: int, stride: int, padding: int) -> None:
        b, c, h, w = src
        self.dst = (b, c, *(_output_size(size, kernel, stride, 2 * padding) for size in (h, w)))
        src_, dst = Layout.channels_last(src), Layout.channels_last(self.dst)
        pairs = [_dims((n, n)) for n in (stride, kernel, 0, padding, padding)]
        description = Handle(
            "dnnl_pooling_forward_primitive_desc",
            *(library().engine, INFERENCE, POOLING_MAX, src_.value, dst.value),
            *pairs,
            None,
        )
        super().__init__(description, {SRC: src_, DST: dst})


def _convolution(
    src: Sequence[int],
    weights: Sequence[int],
    stride: int,
    padding: Sequence[tuple[int, int]] | None,
    kinds: tuple[int, int, int],
) -> tuple[list[Layout], list[ctypes.Array], tuple[int, ...]]:
    """Layouts of src, weights, bias and dst; strides, dilations and paddings; the shape of dst.

    `kinds` are those of src, weights and dst.
    """
    b, _, h, w = src
    *results, _, kh, kw = weights  # those of each group
    o = math.prod(results)
    (top, bottom), (left, right) = padding or [(k // 2, k // 2) for k in (kh, kw)]
    dst = (b, o, _output_size(h, kh, stride, top + bottom), _output_size(w, kw, stride, left + right))
    of_src, of_weights, of_dst = kinds
    layouts = [
        Layout.channels_last(src, of_src),
        Layout.any(weights, of_weights),
        Layout.dense([o]),
        Layout.channels_last(dst, of_dst),
    ]
    return layouts, [_dims(pair) for pair in ((stride, stride), (0, 0), (top, left), (bottom, right))], dst


def _output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """With so much padding before and after it."""
    return (size + padding - kernel) // stride + 1


def _reordered(primitive: Primitive, array: np.ndarray, layout: Layout) -> Buffer:
    result = Buffer.empty(layout.size, kind=layout.kind)
    primitive(Buffer(np.ascontiguousarray(array, np.float32)), result)
    return result


def _dims(values: Sequence[int]) -> ctypes.Array:
    return (c_int64 * 12)(*values)
