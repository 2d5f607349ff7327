"""Fill a layer from named arrays, strictly."""

from collections.abc import Mapping

import numpy as np
from paddle import Tensor, nn

from deploy.cli import UserError


def set_state(layer: nn.Layer, state: Mapping[str, np.ndarray], source: str) -> None:
    """Copy the arrays into the layer's parameters and buffers of the same names.

    Raises:
        UserError: names are missing or unknown, or shapes differ; nothing is copied then.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{source}: holds no named weights")
    own = layer.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    values = {}
    for name, value in state.items():
        if name not in own:
            problems.append(f"{name} is not part of this model")
        elif not isinstance(value, np.ndarray | Tensor) or np.asarray(value).dtype.kind not in "biuf":
            problems.append(f"{name} is no array of numbers")
        elif list(value.shape) != list(own[name].shape):
            problems.append(f"{name} has shape {list(value.shape)} instead of {list(own[name].shape)}")
        else:
            values[name] = np.asarray(value, np.float32)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{source}: does not fit this model: {'; '.join(problems[:5])}{more}")
    layer.set_state_dict(values)
