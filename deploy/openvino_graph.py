"""An OpenVINO model with half the multiplications in its 3x3 convolutions: see `deploy.common.winograd`.

Neither pixelwise operations nor 1x1 convolutions ask for the order of rows. So from the first 3x3 convolution on, all
tensors are four here, each with every fourth row, and what follows is done to each; they are joined where it ends.
"""

from collections.abc import Iterable

import numpy as np
from openvino import Model, Node, Output
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from deploy.common.winograd import A_T, B_T, ROWS, kernels

PIXELWISE = {"Add", "BatchNormInference", "Exp", "Identity", "Multiply", "Relu", "Sigmoid", "Subtract", "Tanh"}

Key = tuple[str, int]  # of a tensor: the name of its node, its number there
Four = tuple[Output, ...]


def use_winograd(model: Model) -> None:
    """Change the model in place. Convolutions of pictures whose height is no multiple of 4 stay as they are."""
    fours: dict[Key, Four] = {}
    transformed: dict[Key, list[Node]] = {}
    changed: dict[str, Node] = {}
    for node in model.get_ordered_ops():
        inputs = node.input_values()
        if _kernel(node) == 3:
            key = _key(inputs[0])
            if key not in transformed:
                transformed[key] = _transformed(_four(inputs[0], fours))
            made = [[row] for row in _convolved(transformed[key], inputs[1].get_node().data)]
        elif _ignores_rows(node) and any(tensor.get_node().get_name() in changed for tensor in inputs):
            split = [_four(tensor, fours) if _height(tensor) > 1 else (tensor,) * ROWS for tensor in inputs]
            made = [_like(node, arguments) for arguments in zip(*split, strict=True)]
        else:
            continue
        changed[node.get_name()] = node
        for i, output in enumerate(node.outputs()):
            fours[_key(output)] = tuple(outputs[i] for outputs in made)
    for node in changed.values():
        for output in node.outputs():
            outside = [place for place in output.get_target_inputs() if place.get_node().get_name() not in changed]
            joined = _join(fours[_key(output)]) if outside else None
            for place in outside:
                place.replace_source_output(joined)
    model.validate_nodes_and_infer_types()


def _key(tensor: Output) -> Key:
    return tensor.get_node().get_name(), tensor.get_index()


def _height(tensor: Output) -> int:
    """Of pictures (..., H, W); 1 for what is repeated along the rows."""
    shape = tensor.get_partial_shape()
    return shape[len(shape) - 2].get_length() if len(shape) > 1 else 1


def _kernel(node: Node) -> int | None:
    """1 or 3 for a convolution of that size which keeps the pictures' size; None for all else."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return None
    size = list(node.input_value(1).get_shape()[2:])
    attributes = node.get_attributes()
    for k in (1, 3):
        same = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [k // 2] * 2, "pads_end": [k // 2] * 2}
        if size == [k, k] and all(list(attributes[name]) == value for name, value in same.items()):
            return k if _height(node.input_value(0)) % ROWS == 0 else None
    return None


def _ignores_rows(node: Node) -> bool:
    kind = node.get_type_name()
    if kind == "Concat":
        return node.get_attributes()["axis"] == 1
    if kind == "VariadicSplit":
        return node.input_value(1).get_node().data == 1
    return kind in PIXELWISE or _kernel(node) == 1


def _four(tensor: Output, fours: dict[Key, Four]) -> Four:
    """Every fourth row of pictures (..., H, W), from the first, the second, the third and the fourth on."""
    key = _key(tensor)
    if key not in fours:
        end, step, axis = _integers(_height(tensor)), _integers(ROWS), _integers(-2)
        fours[key] = tuple(ops.slice(tensor, _integers(i), end, step, axis).output(0) for i in range(ROWS))
    return fours[key]


def _join(four: Four) -> Output:
    """The pictures (B, C, H, W) of which these are every fourth row."""
    channels, rows, columns = (dimension.get_length() for dimension in list(four[0].get_partial_shape())[1:])
    side_by_side = ops.concat([ops.unsqueeze(rows, _integers(3)) for rows in four], 3)
    return ops.reshape(side_by_side, _integers(-1, channels, ROWS * rows, columns), False).output(0)


def _like(node: Node, inputs: Iterable[Output]) -> list[Output]:
    """The same operation on other inputs."""
    inputs = list(inputs)
    if node.get_type_name() == "Identity":
        return inputs
    return NodeFactory().create(node.get_type_name(), inputs, node.get_attributes()).outputs()


def _transformed(four: Four) -> list[Node]:
    """B^T d, (B, C, H / 4, W) each: d[1] ... d[4] are the four, d[0] is the row before, d[5] the one after."""
    first, _, _, last = four
    top, *inner, bottom = B_T
    return [
        _sum([1, *top[1:4]], [_with_neighbour(last, top[[0, 4]], 0), *four[:3]]),
        *(_sum(row[1:5], four) for row in inner),
        _sum([1, *bottom[2:5]], [_with_neighbour(first, bottom[[1, 5]], 1), *four[1:]]),
    ]


def _with_neighbour(rows: Output, weights: np.ndarray, after: int) -> Node:
    """Each row and the one above it (or below: `after` is 1), weighted in the order from above; zeros outside."""
    channels = rows.get_partial_shape()[1].get_length()
    kernel = np.tile(weights[:, None].astype(np.float32), (channels, 1, 1, 1, 1))
    return ops.group_convolution(rows, kernel, [1, 1], [1 - after, 0], [after, 0], [1, 1])


def _convolved(transformed: list[Node], weights: np.ndarray) -> Four:
    """A^T [(G g) * (B^T d)], (B, O, H / 4, W) each."""
    first, *inner, last = (
        ops.convolution(rows, ops.constant(kernel), [1, 1], [0, 1], [0, 1], [1, 1])
        for rows, kernel in zip(transformed, kernels(weights), strict=True)
    )
    rows = [_sum(row[1:5], inner) for row in A_T]
    # added last, and so within the convolution
    rows[0], rows[-1] = ops.add(first, rows[0]), ops.add(last, rows[-1])
    return tuple(row.output(0) for row in rows)


def _sum(factors: Iterable[float], tensors: Iterable[Node | Output]) -> Node:
    """Of factor times tensor."""
    total = None
    for factor, tensor in zip(factors, tensors, strict=True):
        if total is None:
            total = tensor if factor == 1 else ops.multiply(tensor, np.float32(factor))
        elif factor == -1:
            total = ops.subtract(total, tensor)
        elif factor:
            total = ops.add(total, tensor if factor == 1 else ops.multiply(tensor, np.float32(factor)))
    return total


def _integers(*values: int) -> Node:
    return ops.constant(np.array(values, np.int64))
