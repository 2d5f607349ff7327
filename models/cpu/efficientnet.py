"""A frozen EfficientNet-Lite on the CPU: which calls make up its network."""

from paddle import nn

from models.cpu.features import Program
from models.cpu.onednn import CLIP, Buffer

RELU6 = (CLIP, 0, 6)


class EfficientNetProgram(Program):
    """Takes a `models.efficientnet.EfficientNetLite0Features`.

    8 pictures of 256x256 cost 0.11 s of processor time, and 1.1 s with Paddle's operators, half of it the depthwise
    convolutions (two cores with AVX-512; with AVX2 alone 0.13 s).
    """

    def __init__(self, model: nn.Layer, b: int, h: int, w: int) -> None:
        super().__init__(b, h, w)
        gain, shift = (numbers.numpy().ravel() for numbers in (model.gain, model.shift))

        def scale(images: Buffer) -> None:
            images.array *= gain
            images.array += shift

        self.calls.append((scale, [self.images]))
        x, shape = self._convolve(model.stem, self.images, (b, 3, h, w), to=1, activation=RELU6)
        for i, block in enumerate(model.blocks):
            wide = x, shape
            if block.expand is not None:
                wide = self._convolve(block.expand, *wide, to=2, activation=RELU6)
            wide = self._convolve(block.depthwise, *wide, to=3, activation=RELU6)
            x, shape = self._convolve(block.project, *wide, to=1, add_to=x if block.residual else None)
            if i in model.taken:
                self.leave(x, shape)

    def _convolve(
        self, layer: nn.Layer, x: Buffer, shape: tuple[int, ...], **options
    ) -> tuple[Buffer, tuple[int, ...]]:
        """Like `convolve`, of a `ConvNorm`."""
        kernel, stride = layer.conv._kernel_size[0], layer.conv._stride[0]
        padding = [same_padding(size, kernel, stride) for size in shape[2:]] if stride > 1 else None
        return self.convolve(layer.conv, layer.norm, x, shape, padding=padding, **options)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding before and after a side, for ceil(size / stride) results: the odd place is at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
