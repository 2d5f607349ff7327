"""The gradient of a convolution's weights as products of matrices, for a kernel of any odd size with stride 1.

    gradient of weights[:, :, y, x] = gradient of dst (O, pixels) @ src moved by (y, x) (pixels, I)

The product is over the pixels of all images one after the other, in frames of zeros as wide as the kernel reaches.
"""

import weakref
from collections.abc import Sequence

import numpy as np

from models.cpu.onednn import Buffer, Layout, channel_sums, matmul, reorder


class WeightsGradientByProducts:
    """This is called like a WeightsGradient, in float32; it is a product of matrices for each place (y, x)."""

    def __init__(self, src: Sequence[int], weights: Sequence[int]) -> None:
        b, i, h, w = src
        o, _, kh, kw = weights
        frame = (kh // 2, kw // 2)
        self._frames = frames("src", 1, b, h, w, i, *frame), frames("gradient", 1, b, h, w, o, *frame)
        self._fill = [reorder(Layout.channels_last((b, *f.shape[1:])), f.images()) for f in self._frames]
        self._products = Products(*self._frames, kh, kw)
        self.size = self._products.size

    def __call__(self, src: Buffer, gradient: Buffer, weights: Buffer, bias: Buffer) -> None:
        for fill, images, framed in zip(self._fill, (src, gradient), self._frames, strict=True):
            fill(images, framed.first)
        self._products(weights)
        bias.array[...] = channel_sums(gradient.array[None])[0]

    def unpacked(self, gradient: np.ndarray) -> np.ndarray:
        """Weights' gradients as a call writes them -> (O, I, kH, kW)."""
        return np.ascontiguousarray(self._products.unpacked(gradient)[0])


class Frames:
    """This is memory for sheets of b images, (b, h, w, c), with zeros around each image.

    There are px pixels of zeros after each row and py rows of them after each image; those before are the ones after
    the last row or image, or lie before the first.
    """

    def __init__(self, sheets: int, b: int, h: int, w: int, c: int, py: int, px: int) -> None:
        self.shape, self._padded = (b, c, h, w), (h + py, w + px)
        self.row = w + px  # pixels
        self.lead = py * self.row + px
        self.pixels = b * (h + py) * self.row - self.lead  # from the first one of the first image to the last's last
        memory = Buffer.empty(sheets, 2 * self.lead + self.pixels, c)
        memory.array[...] = 0
        self.size = memory.array[0].size  # numbers of a sheet
        self.sheets = [memory[sheet] for sheet in range(sheets)]
        self.first = Buffer(memory.array.ravel()[self.lead * c :])

    def images(self) -> Layout:
        """Return where the images of a sheet lie, from `first` on."""
        _, c, _, _ = self.shape
        height, width = self._padded
        return Layout.strided(self.shape, (height * width * c, 1, width * c, c))


_frames: weakref.WeakValueDictionary[tuple, Frames] = weakref.WeakValueDictionary()


def frames(role: str, *shape: int) -> Frames:
    """Return the `Frames` of this role and shape; all who hold them share them, for they are called one by one."""
    key = (role, *shape)
    found = _frames.get(key)
    if found is None:
        found = _frames[key] = Frames(*shape)
    return found


class Products:
    """A call (result) writes the product of gradient and moved src for each sheet and each place (y, x) of a kernel."""

    def __init__(self, src: Frames, gradient: Frames, kh: int, kw: int) -> None:
        i, o, pixels = src.shape[1], gradient.shape[1], gradient.pixels
        inside = slice(gradient.lead, gradient.lead + pixels)
        # The library's product is up to a quarter faster with as many columns as fill vectors.
        self._transposed = o % 8 == 0
        rows, columns = (i, o) if self._transposed else (o, i)
        self._product = matmul(
            Layout.strided((rows, pixels), (1, rows)), Layout.dense((pixels, columns)), Layout.dense((rows, columns))
        )
        self._pairs = []
        for moved, fixed in zip(src.sheets, gradient.sheets, strict=True):
            for start in (y * src.row + x for y in range(kh) for x in range(kw)):
                pair = (moved[start:], fixed[inside])
                self._pairs.append(pair if self._transposed else pair[::-1])
        self._shape = (kh, kw, rows, columns)
        self.size = len(self._pairs) * rows * columns

    def __call__(self, result: Buffer) -> None:
        for pair, place in zip(self._pairs, result.array.reshape(len(self._pairs), -1), strict=True):
            self._product(*pair, Buffer(place))

    def unpacked(self, result: np.ndarray) -> np.ndarray:
        """What a call writes -> (sheets, O, I, kH, kW)."""
        order = (0, 4, 3, 1, 2) if self._transposed else (0, 3, 4, 1, 2)
        return result.reshape(-1, *self._shape).transpose(order)
