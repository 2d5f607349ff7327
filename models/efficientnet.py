"""EfficientNet-Lite0 as a frozen extractor of features (Tan and Le 2019, arXiv 1905.11946).

It is the paper's B0 for small devices: without squeeze-and-excitation, and with ReLU6 in the place of swish. Source of
the differences: the Lite models of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

import re
from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from deploy.common.imaging import MEAN, STD
from models.cpu.efficientnet import EfficientNetProgram
from models.cpu.features import features

STEM = 32  # channels
# Repeats, kernel, stride of the first block, expansion, channels: table 1 of the paper.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BLOCKS = sum(repeats for repeats, *_ in STAGES)
LEVELS = {4: 2, 8: 3, 16: 5, 32: 7}  # by scale: after how many stages; the last of those that have it
EPSILON = 1e-3  # of the BatchNorms
# How others call the parts of a block: EfficientNet-PyTorch, timm, and timm in the first block, which has no expansion.
PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}
TIMMS_PARTS = dict(zip(("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), PARTS.values(), strict=True))
TIMMS_FIRST_PARTS = dict(zip(("conv_dw", "bn1", "conv_pw", "bn2"), list(PARTS.values())[2:], strict=True))


class ConvNorm(nn.Layer):
    """A convolution and its BatchNorm.

    The padding is TensorFlow's: ceil(size / stride) places, the odd row or column of zeros at the end.
    """

    def __init__(self, channels: int, results: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2D(channels, results, kernel, stride, padding="SAME", groups=groups, bias_attr=False)
        self.norm = nn.BatchNorm2D(results, epsilon=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        return self.norm(self.conv(x))


class Block(nn.Layer):
    """An inverted residual block (MBConv): wider by a 1x1 convolution, each channel by itself, narrow again."""

    def __init__(self, channels: int, results: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNorm(channels, wide) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, results)
        self.residual = stride == 1 and channels == results

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0Features(nn.Layer):
    """The network up to the last feature map that is wanted."""

    def __init__(self, scales: Sequence[int]) -> None:
        """Scales are some of `LEVELS`, finest first."""
        super().__init__()
        stages = STAGES[: LEVELS[scales[-1]]]
        ends = np.cumsum([repeats for repeats, *_ in stages])
        self.taken = [int(ends[LEVELS[scale] - 1]) - 1 for scale in scales]  # blocks, of 0 to 15 these: 2, 4, 10, 15
        self.stem = ConvNorm(3, STEM, kernel=3, stride=2)
        self.blocks = nn.LayerList()
        channels = STEM
        for repeats, kernel, stride, expansion, results in stages:
            for i in range(repeats):
                self.blocks.append(Block(channels, results, kernel, stride if i == 0 else 1, expansion))
                channels = results
        # It was trained on (value - 127) / 128; here pictures come as (value / 255 - MEAN) / STD.
        mean, std = (np.float32(numbers).reshape(1, 3, 1, 1) for numbers in (MEAN, STD))
        self.register_buffer("gain", paddle.to_tensor(std * 255 / 128), persistable=False)
        self.register_buffer("shift", paddle.to_tensor((mean * 255 - 127) / 128), persistable=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> of (B, 24, H/4, W/4), (B, 40, H/8, W/8), (B, 112, H/16, W/16), (B, 320, H/32, W/32) those of
        `scales`, sizes rounded up.

        `_plain` says what is computed, `models.cpu` how on a CPU.
        """
        return features(self, images, self._plain, EfficientNetProgram)

    def _plain(self, images: Tensor) -> list[Tensor]:
        x = F.relu6(self.stem(images * self.gain + self.shift))
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taken:
                maps.append(x)
        return maps


def own_name(name: str) -> str:
    """The name that a parameter has here, of its name in EfficientNet-PyTorch or timm.

    The weights are the same in both. Names of neither, and of what comes after the features, stay.
    """
    if match := re.fullmatch(r"(_conv_stem|_bn0|conv_stem|bn1)\.(\w+)", name):
        return f"stem.{'conv' if 'conv' in match[1] else 'norm'}.{match[2]}"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        number, part, last = match.groups()
        return f"blocks.{number}.{PARTS.get(part, part)}.{last}"
    if match := re.fullmatch(r"blocks\.([0-6])\.([0-3])\.(\w+)\.(\w+)", name):
        stage, i, part, last = int(match[1]), int(match[2]), match[3], match[4]
        if i < STAGES[stage][0]:  # EfficientNet-Lite1 has more of the same blocks
            parts = TIMMS_PARTS if stage else TIMMS_FIRST_PARTS
            return f"blocks.{sum(repeats for repeats, *_ in STAGES[:stage]) + i}.{parts.get(part, part)}.{last}"
    return name
