"""Fill a layer from named arrays, strictly."""

from collections.abc import Mapping

import numpy as np
from paddle import nn

from deploy.cli import UserError


def set_state(layer: nn.Layer, state: Mapping[str, np.ndarray], source: str) -> None:
    """Copy the arrays into the layer's parameters and buffers of the same names.

    Raises:
        UserError: names are missing or unknown, or shapes differ; nothing is copied then.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{source}: holds no named weights")
    own = layer.state_dict()
    shapes = {name: list(np.shape(value)) for name, value in state.items()}
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of this model" for name in state if name not in own]
    problems += [
        f"{name} has shape {shapes[name]} instead of {list(own[name].shape)}"
        for name in own
        if name in state and shapes[name] != list(own[name].shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{source}: does not fit this model: {'; '.join(problems[:5])}{more}")
    layer.set_state_dict({name: np.asarray(value, np.float32) for name, value in state.items()})
