"""3x3 convolutions of stride 1 on oneDNN in the form of `deploy.common.winograd`, and the gradient of their weights.

With AVX2 only, that is half the multiplications, and less time. The transforms B^T d and A^T m are products of a small
matrix with rows of pixels, channels-last. B^T d are six pictures, one after the other in memory, each with a row for
each four rows of what the convolution takes. The product makes it of these four, d1 ... d4; a second one adds d0 and
d5, of the four before and the four after.
"""

from collections.abc import Sequence

import numpy as np

from deploy.common.winograd import A_T, B_T, ROWS, G
from models.cpu.onednn import Buffer, Convolution, Layout, PostOps, Primitive, channel_sums, matmul, reorder, turned
from models.cpu.products import Frames, Products, frames


class WinogradConvolution:
    """This is called like a Convolution, 3x3 with stride 1 and in float32; H is a multiple of 4."""

    def __init__(self, src: Sequence[int], weights: Sequence[int], post_ops: PostOps | None = None) -> None:
        b, i, h, w = src
        o = weights[0]
        self.dst = (b, o, h, w)
        d, self._m = _six("d", b, i, h, w, 0), _six("m", b, o, h, w, 0)
        self._transform = _Transform(b, i, h, w, d)
        self._pairs = list(zip(d.sheets, self._m.sheets, strict=True))
        self._convolution = Convolution((b, i, h // ROWS, w), (o, i, 1, 3))
        self._join = _Combination(A_T, _rows_of_six(b, self._m), _rows(b, o, h, w), post_ops)
        self._no_bias = Buffer(np.zeros(o, np.float32))
        packed = self._convolution.weights
        # a row of kernels (O, I, 3, 3), and of the same where (I, O, 3, 3) lies in memory
        self._pack, self._pack_transposed = (
            reorder(Layout.strided((o, i, 1, 3), (*strides, 3, 1)), packed) for strides in ((9 * i, 9), (9, 9 * o))
        )
        self._kernels = _Combination(G, Layout.dense((1, 1, 3, packed.size)), Layout.dense((1, 1, 6, packed.size)))
        self._size = packed.size

    def __call__(self, src: Buffer, weights: list[Buffer], bias: Buffer, dst: Buffer) -> None:
        self._transform(src)
        for place, (d, m) in enumerate(self._pairs):
            # column 1 of A^T has ones only: what is added there is added to every row
            self._convolution(d, weights[place], bias if place == 1 else self._no_bias, m)
        self._join(self._m.first, dst)

    def packed(self, weights: np.ndarray) -> list[Buffer]:
        """Weights (O, I, 3, 3) as a call takes them."""
        return self._packed(self._pack, weights)

    def packed_adjoint(self, weights: np.ndarray) -> list[Buffer]:
        """See `models.cpu.onednn.Convolution.packed_adjoint`."""
        return self._packed(self._pack_transposed, turned(weights))

    def _packed(self, pack: Primitive, weights: np.ndarray) -> list[Buffer]:
        numbers = np.ascontiguousarray(weights, np.float32).ravel()
        rows, combined = Buffer.empty(3, self._size), Buffer.empty(6, self._size)
        for y in range(3):
            pack(Buffer(numbers[3 * y :]), rows[y])
        self._kernels(rows, combined)
        return [combined[place] for place in range(6)]


class WinogradWeightsGradient:
    """This is called like a WeightsGradient, 3x3 and in float32; H is a multiple of 4.

    The gradient of m is A times that of y, the gradient of G g that of six convolutions of B^T d, and the gradient of g
    is G^T times that.
    """

    def __init__(self, src: Sequence[int], weights: Sequence[int]) -> None:
        b, i, h, w = src
        o = weights[0]
        d, self._m = _six("src", b, i, h, w, 1), _six("gradient", b, o, h, w, 1)
        self._transform = _Transform(b, i, h, w, d)
        self._spread = _Combination(A_T.T, _rows(b, o, h, w), _rows_of_six(b, self._m))
        self._sums = self._m.sheets[1].array[None, self._m.lead :]  # row 1 of A is ones only
        self._products = Products(d, self._m, 1, 3)
        self.size = self._products.size
        self._gather = _Combination(
            G.T, Layout.dense((1, 1, 6, self.size // 6)), Layout.dense((1, 1, 3, self.size // 6))
        )

    def __call__(self, src: Buffer, gradient: Buffer, weights: Buffer, bias: Buffer) -> None:
        self._transform(src)
        self._spread(gradient, self._m.first)
        self._products(weights)
        bias.array[...] = channel_sums(self._sums)[0]

    def unpacked(self, gradient: np.ndarray) -> np.ndarray:
        """Weights' gradients as a call writes them -> (O, I, 3, 3)."""
        rows = Buffer.empty(3, self.size // 6)
        self._gather(Buffer(gradient), rows)
        return np.ascontiguousarray(self._products.unpacked(rows.array)[:, :, :, 0].transpose(1, 2, 0, 3))


def _six(role: str, b: int, c: int, h: int, w: int, gap: int) -> Frames:
    """Return six pictures for (b, c, h, w), each with a row for each four rows of it, with zeros between the rows."""
    return frames(role, 6, 1, b * h // ROWS, w, c, 0, gap)


def _rows_of_six(b: int, six: Frames) -> Layout:
    """Return where the rows of the `_six` of b pictures lie, from `first` on, as (b, H / 4, 6, W C)."""
    _, c, h, w = six.shape
    return Layout.strided((b, h // b, 6, w * c), (h // b * six.row * c, six.row * c, six.size, 1))


def _rows(b: int, c: int, h: int, w: int) -> Layout:
    """Pictures, channels-last, as (b, H / 4, 4, W C)."""
    return Layout.dense((b, h // ROWS, ROWS, w * c))


class _Combination:
    """(src, dst): dst = post_ops(matrix @ src)."""

    def __init__(self, matrix: np.ndarray, src: Layout, dst: Layout, post_ops: PostOps | None = None) -> None:
        self._matrix = Buffer(np.ascontiguousarray(matrix, np.float32))
        self._product = matmul(Layout.dense((1, 1, *matrix.shape)), src, dst, post_ops)

    def __call__(self, src: Buffer, dst: Buffer) -> None:
        self._product(self._matrix, src, dst)


class _Transform:
    """(pictures): B^T d into `six`."""

    def __init__(self, b: int, c: int, h: int, w: int, six: Frames) -> None:
        fours, row, after = h // ROWS, w * c, six.row * c
        self._six = six
        self._inner = _Combination(B_T[:, 1:5], _rows(b, c, h, w), _rows_of_six(b, six))
        self._outer = None
        if fours > 1:
            # rows 4j + 3 and 4j + 4, of which the first is d0 of the four that follows and the second d5 of this one
            pairs = Layout.strided((b, fours - 1, 2, row), (h * row, ROWS * row, row, 1))
            to = Layout.strided((b, fours - 1, 2, row), (fours * after, after, 5 * six.size - after, 1))
            self._outer = _Combination(np.diag([B_T[0, 0], B_T[5, 5]]), pairs, to, PostOps().sum())
            self._first_pair, self._following = 3 * row, Buffer(six.first.array[after:])

    def __call__(self, pictures: Buffer) -> None:
        self._inner(pictures, self._six.first)
        if self._outer:
            self._outer(Buffer(pictures.array.ravel()[self._first_pair :]), self._following)
