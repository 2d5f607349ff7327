"""Data-parallel training on Paddle's own engine, started by `python -m paddle.distributed.launch ... train.py ...`.

Every process holds the whole model and computes its share of each global batch; gradients, and the batch statistics
of the norms, are summed over the processes, so that the result is that of one process. With one process nothing
here does anything.
"""

import atexit
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.base import core

from deploy.common.cli import UserError
from models.fastflow import FastFlow

LONGEST_WAIT = 3600  # seconds for the slowest process; after so many the others take it for gone
POLL = 0.05  # seconds


def join() -> None:
    """Join the processes that the launcher started."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        dist.init_parallel_env()
        atexit.register(_leave)


def _leave() -> None:
    """Tell those who wait for this process; a launcher ends only the processes of its own machine."""
    with contextlib.suppress(UserError):
        _count("ended", 1)


def _count(key: str, amount: int) -> int:
    """Add to a counter that the processes share, in the launcher's key-value store; return its value.

    Raises:
        UserError: the store has ended, with the first process.
    """
    try:
        return core.create_or_get_global_tcp_store().add(key, amount)
    except ValueError as error:
        raise UserError("the first process has ended; see workerlog.* in its launcher's --log_dir") from error


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that evaluates and writes."""
    return processes() == 1 or dist.get_rank() == 0


def share(batch: np.ndarray) -> tuple[np.ndarray, float]:
    """This process's part of a global batch of indices, and the part's weight in the batch's mean.

    A batch with fewer pictures than processes is computed whole by each of them, with equal weights.
    """
    if len(batch) < processes():
        return batch, 1 / processes()
    part = np.array_split(batch, processes())[dist.get_rank()] if processes() > 1 else batch
    return part, len(part) / len(batch)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one exchange."""
    tensors = list(tensors)
    if processes() == 1 or not tensors:
        return
    flat = paddle.concat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = paddle.split(flat, [tensor.size for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.set_value(part.reshape(tensor.shape))


def meet() -> None:
    """Wait until every process is here, before an exchange that another may come to much later.

    An exchange would give up after 30 seconds: that is gloo's limit, and Paddle 3.3.1 lets nobody change it. So all
    come here first: the counter of arrivals has no such limit.

    Raises:
        UserError: a process has ended, or does not come.
    """
    if processes() == 1:
        return
    deadline = time.monotonic() + LONGEST_WAIT
    arrivals = _count("arrivals", 1)
    everyone = math.ceil(arrivals / processes()) * processes()  # nobody comes again before all have been here
    while arrivals < everyone:
        ended = _count("ended", 0)  # before the arrivals: one that has ended may have been here first
        arrivals = _count("arrivals", 0)
        if arrivals < everyone and (ended or time.monotonic() > deadline):
            raise UserError(
                f"{everyone - arrivals} of {processes()} processes do not come any more (one has ended, or "
                f"{LONGEST_WAIT} s are over); see workerlog.* in the launchers' --log_dir"
            )
        if arrivals < everyone:
            time.sleep(POLL)


def train_together(model: FastFlow) -> None:
    """Give the model of every process the first one's parameters and buffers, and its norms the sum over processes."""
    if processes() == 1:
        return
    for norm in model.norms:
        norm.sum_over_processes = sum_over_processes
    meet()
    for tensor in model.state_dict(include_sublayers=True).values():
        dist.broadcast(tensor, 0)


def from_first(compute: Callable[[], tuple]) -> tuple:
    """What `compute` gives in the first process, in all of them; it runs there only."""
    if processes() == 1:
        return compute()
    box = [compute() if is_first() else ()]  # a list of one, which the exchange fills
    meet()
    dist.broadcast_object_list(box, 0)
    return box[0]
