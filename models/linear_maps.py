"""Bilinear and bicubic resize and Gaussian smoothing as matrices.

All are linear and separable: out = A x B^T with a fixed matrix per axis. Two matmuls run on every device and
in every inference runtime, and are exact where a framework's own operator differs or is missing.
"""

import numpy as np


def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float32: bilinear interpolation of one axis with align_corners=True."""
    position = np.linspace(0, size_in - 1, size_out)
    left = np.minimum(position.astype(int), max(size_in - 2, 0))
    weight = position - left
    rows = np.arange(size_out)
    matrix = np.zeros((size_out, size_in))
    matrix[rows, left] = 1 - weight
    if size_in > 1:
        matrix[rows, left + 1] = weight
    return matrix.astype(np.float32)


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float32: bicubic interpolation of one axis, without aliases where it gets smaller.

    Keys' kernel with a = -0.5 (doi 10.1109/TASSP.1981.1163711), as wide as what it gets smaller by, as in Pillow, and
    in torch's `interpolate(mode="bicubic", antialias=True)`.
    """
    ratio = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * ratio
    x = np.abs(np.arange(size_in) + 0.5 - centre[:, None]) / max(ratio, 1)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)


def gaussian_matrix(size: int, sigma: float, truncate: float = 4.0) -> np.ndarray:
    """(size, size) float32: Gaussian smoothing of one axis, as `scipy.ndimage.gaussian_filter` by default.

    The kernel is cut at `truncate * sigma` pixels and the border is mirrored (d c b a | a b c d | d c b a).
    """
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    columns = (np.arange(size)[:, None] + offsets) % (2 * size)  # (size, 2 radius + 1), in the mirrored period
    columns = np.minimum(columns, 2 * size - 1 - columns)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], columns), kernel)
    return matrix.astype(np.float32)
