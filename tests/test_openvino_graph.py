"""Winograd's convolutions in an OpenVINO model: the same numbers, where they can be had."""

import numpy as np
import pytest

from tests.converter import INSTALL

openvino = pytest.importorskip("openvino", reason=f"openvino: {INSTALL}")

from openvino import opset13 as ops  # noqa: E402

from deploy.openvino_graph import use_winograd  # noqa: E402


def weights(*shape):
    random = np.random.default_rng(sum(shape))
    return ops.constant((random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))


def convolution(x, outputs, kernel=3, stride=1, padding=None, dilation=1):
    padding = [dilation * (kernel // 2)] * 2 if padding is None else padding
    inputs = x.get_partial_shape()[1].get_length()
    strides, dilations = [stride] * 2, [dilation] * 2
    return ops.convolution(x, weights(outputs, inputs, kernel, kernel), strides, padding, padding, dilations)


def as_output(node):
    return node.output(0) if isinstance(node, openvino.Node) else node


def compare(model, shape):
    """The model's 3x3 convolutions after it was changed; its results are those of before."""
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    before = core.compile_model(model, "CPU", settings)([images])
    use_winograd(model)
    after = core.compile_model(model, "CPU", settings)([images])
    for i, expected in enumerate(before.values()):
        np.testing.assert_allclose(after[i], expected, rtol=0, atol=2e-5 * abs(expected).max())
    kernels = [n.input_value(1).get_shape() for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]
    return sum(tuple(kernel[2:]) == (3, 3) for kernel in kernels)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("height", [4, 8, 24])
def test_everything_that_does_not_ask_for_the_order_of_rows(count, height):
    images = ops.parameter([-1, 5, height, 7], np.float32)
    x = ops.relu(ops.add(convolution(as_output(images), 8), weights(1, 8, 1, 1)))
    first, second = ops.variadic_split(x, ops.constant(1), ops.constant([3, 5])).outputs()
    second = ops.multiply(convolution(second, 3), ops.exp(ops.sigmoid(first)))
    x = convolution(as_output(ops.concat([second, first], 1)), 4, kernel=1)
    per_row = weights(4, height, 1)  # a picture without the first dimension
    x = ops.add(x, per_row)
    statistics = [weights(4), weights(4), weights(4), ops.constant(np.full(4, 0.5, np.float32))]
    x = ops.batch_norm_inference(x, *statistics, 1e-5)
    x = ops.subtract(convolution(as_output(x), 5), images)
    model = openvino.Model([ops.reduce_max(x, ops.constant([2])), x], [images])
    assert compare(model, (count, 5, height, 7)) == 0


def test_convolutions_of_another_kind_stay():
    images = ops.parameter([-1, 4, 20, 12], np.float32)
    x = as_output(convolution(as_output(images), 6))  # the only one that is changed
    dilated, unpadded = convolution(x, 4, dilation=2), convolution(x, 4, padding=[0, 0])
    halved = convolution(x, 4, stride=2)
    odd_height = convolution(as_output(halved), 4)  # of 10 rows
    model = openvino.Model([dilated, unpadded, halved, odd_height], [images])
    assert compare(model, (2, 4, 20, 12)) == 4


def test_what_is_not_needed_is_not_computed():
    """Of a convolution that follows another kind, neither the old form nor that of its predecessors is left."""
    images = ops.parameter([-1, 4, 16, 8], np.float32)
    x = ops.relu(convolution(as_output(images), 4))
    x = convolution(as_output(x), 4, stride=2)
    model = openvino.Model([convolution(as_output(x), 4)], [images])
    assert compare(model, (1, 4, 16, 8)) == 1
    assert sum(node.get_type_name() == "Convolution" for node in model.get_ordered_ops()) == 6 + 1 + 6
