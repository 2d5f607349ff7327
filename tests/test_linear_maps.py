"""The fixed matrices against the operators that they stand for."""

import numpy as np
import paddle
import pytest
from scipy import ndimage

from models.linear_maps import bilinear_matrix, gaussian_matrix


@pytest.mark.parametrize(
    ("size", "sigma", "truncate"),
    [(256, 6.0, 4.0), (64, 6.0, 4.0), (24, 6.0, 4.0), (7, 6.0, 4.0), (2, 6.0, 4.0), (1, 6.0, 4.0), (33, 1.3, 2.5)],
)
def test_smoothing_is_scipys_gaussian_filter(size, sigma, truncate):
    """The radius is 24 with sigma 6: the smaller sizes mirror the border several times."""
    picture = np.random.default_rng(size).random((size, size))
    matrix = gaussian_matrix(size, sigma, truncate)
    expected = ndimage.gaussian_filter(picture, sigma, truncate=truncate)
    np.testing.assert_allclose(matrix @ picture @ matrix.T, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(64, 256), (32, 256), (16, 256), (9, 33), (1, 5), (2, 7), (5, 5), (8, 1), (12, 5)]
)
def test_resize_is_paddles_bilinear_with_aligned_corners(size_in, size_out):
    picture = np.random.default_rng(size_in).random((1, 1, size_in, size_in)).astype(np.float32)
    expected = paddle.nn.functional.interpolate(
        paddle.to_tensor(picture), size=[size_out, size_out], mode="bilinear", align_corners=True
    )
    matrix = bilinear_matrix(size_in, size_out)
    np.testing.assert_allclose(matrix @ picture[0, 0] @ matrix.T, expected.numpy()[0, 0], atol=1e-5)
