"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import paddle

from deploy.common.cli import UserError
from models.fastflow import FastFlow


class WeightAverage:
    """After each optimizer step t = 1, 2, ...

        average <- d average + (1 - d) parameter,   d = min(decay, (1 + t) / (10 + t))

    so that the average forgets the random start soon and reaches back over about 1 / (1 - decay) steps later
    (Polyak and Juditsky 1992; the ramp is that of TensorFlow's ExponentialMovingAverage). The noise of single steps
    is averaged out of it. Buffers are not averaged: BatchNorm's statistics are moving averages already.
    """

    def __init__(self, model: FastFlow, decay: float) -> None:
        """Start from the parameters that training changes, as they are now.

        Args:
            model: the model in training.
            decay: d in [0, 1); with 0 the average is the parameters themselves and nothing is kept.
        """
        self._decay, self._steps = decay, 0
        named = model.named_parameters() if decay else ()
        self._parameters = {name: p for name, p in named if not p.stop_gradient}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @paddle.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        self._steps += 1
        d = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter, 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the averages, to be evaluated and stored; then its own parameters again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, object]:
        """What a resumed training needs beside the stored averages; call it within `applied`."""
        return {"steps": self._steps, "parameters": {name: value.numpy() for name, value in self._average.items()}}

    def resume(self, state: dict[str, object], source: str) -> None:
        """Go on from `state`, with the stored averages in the model; the model then holds its parameters again.

        Raises:
            UserError: the state is not of this model.
        """
        try:
            steps, parameters = state["steps"], state["parameters"]
            if type(steps) is not int or steps < 0:
                raise ValueError(f"steps {steps}")
            fits = parameters.keys() == self._parameters.keys() and all(
                isinstance(value := parameters[name], np.ndarray)
                and value.dtype == np.float32
                and list(value.shape) == p.shape
                for name, p in self._parameters.items()
            )
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{source}: its moving average is damaged ({error!r}); train again") from error
        if not fits:
            raise UserError(f"{source}: its moving average is not of this model; train again")
        self._steps = steps
        for name, parameter in self._parameters.items():
            self._average[name].set_value(parameter)
            parameter.set_value(parameters[name])

    @paddle.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.set_value(self._average[name])
            self._average[name].set_value(own)
