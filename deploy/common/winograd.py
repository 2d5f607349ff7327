"""Winograd's F(4, 3) for the rows of a 3x3 convolution of stride 1, which is half the multiplications.

Four rows y of the result, 4j ... 4j + 3, come from six rows d of what it takes, 4j - 1 ... 4j + 4. With the three rows
g of the kernel that is twelve convolutions of a row by a kernel of one row. In the form

    y = A^T [(G g) * (B^T d)]

of Lavin & Gray (2016, arXiv 1509.09308, section 4.3) it is six. The numbers are the same but for rounding.
"""

import numpy as np

ROWS = 4
B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
A_T = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def kernels(weights: np.ndarray) -> np.ndarray:
    """G g: weights (O, I, 3, 3) -> (6, O, I, 1, 3), float32."""
    return np.tensordot(G, weights, (1, 2))[:, :, :, None].astype(np.float32)
