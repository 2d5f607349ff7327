"""Loss scaling for float16, whose smallest number is too large for many gradients."""

import math
from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor

from deploy.common.cli import UserError

START, RISE_AFTER = 2.0**16, 2000  # those of paddle.amp.GradScaler


class LossScale:
    """A power of two that the loss is multiplied by, so that its gradients stay within float16.

    A step whose gradients are not all finite is left out and halves the scale, as long as it is above 1; a run of good
    steps doubles it (Micikevicius et al. 2018, arXiv 1710.03740). It is here because paddle.amp.GradScaler (3.3.1) ends
    in a TypeError at the first such step with NumPy 2.4, and does nothing on a CPU, where tests run.
    """

    def __init__(self) -> None:
        self._scale, self._good_steps = START, 0
        self.skipped = 0  # steps left out so far in this process

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate in the place of the loss."""
        return loss * self._scale

    @paddle.no_grad()
    def step(self, optimizer: paddle.optimizer.Optimizer, gradients: Sequence[Tensor]) -> None:
        """Take the optimizer's step with these gradients of the scaled loss, or leave it out; choose the next scale."""
        finite = paddle.stack([paddle.isfinite(gradient).all() for gradient in gradients]).all().item()
        if finite:
            for gradient in gradients:
                gradient.scale_(1 / self._scale)
            optimizer.step()
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self._scale = max(1.0, self._scale / 2)
            self.skipped += 1
        elif self._good_steps == RISE_AFTER:
            self._scale, self._good_steps = 2 * self._scale, 0

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"scale": self._scale, "good_steps": self._good_steps}

    def resume(self, state: Any, source: str) -> None:
        """Go on from `state`.

        Raises:
            UserError: it is none.
        """
        try:
            scale, self._good_steps = float(state["scale"]), int(state["good_steps"])
            if not 0 < scale < math.inf:
                raise ValueError(scale)
            self._scale = scale
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source}: its loss scale is damaged ({error!r}); train again") from error
