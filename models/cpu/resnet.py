"""A frozen ResNet on the CPU: which calls make up its network."""

from paddle import nn

from models.cpu.features import Program, pairs
from models.cpu.onednn import RELU, Buffer, MaxPool


class ResNetProgram(Program):
    """Takes a model with the attributes of `paddle.vision.models.ResNet`, of basic or bottleneck blocks.

    Its `layers` are the names of its layers, each with whether the feature map after it is wanted.
    """

    def __init__(self, model: nn.Layer, b: int, h: int, w: int) -> None:
        super().__init__(b, h, w)
        x, shape = self.convolve(model.conv1, model.bn1, self.images, (b, 3, h, w), to=1, activation=[RELU])
        pool = MaxPool(shape, model.maxpool.ksize, model.maxpool.stride, model.maxpool.padding)
        pooled = self.buffer(0, pool.dst)
        self.calls.append((pool, [x, pooled]))
        x, slot, shape = pooled, 0, pool.dst
        for name, is_wanted in model.layers:
            for block in getattr(model, name):
                x, slot, shape = self._block(block, x, slot, shape)
            if is_wanted:
                self.leave(x, shape)

    def _block(
        self, block: nn.Layer, x: Buffer, slot: int, shape: tuple[int, ...]
    ) -> tuple[Buffer, int, tuple[int, ...]]:
        """A residual block on x, which lies in one of four slots: its result, the slot of that, and its shape."""
        residual, free = x, [i for i in range(4) if i != slot]
        if block.downsample is not None:
            slot = free.pop()
            residual, _ = self.convolve(*block.downsample, x, shape, to=slot)
        *first, last = [(getattr(block, conv), getattr(block, bn)) for conv, bn in pairs(block)]
        for conv, bn in first:
            x, shape = self.convolve(conv, bn, x, shape, to=free.pop(), activation=[RELU])
        _, shape = self.convolve(*last, x, shape, activation=[RELU], add_to=residual)
        return residual, slot, shape
