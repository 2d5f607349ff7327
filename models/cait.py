"""CaiT as a frozen extractor of features (Touvron et al. 2021, arXiv 2103.17239).

A Vision Transformer whose heads talk to each other (Shazeer et al. 2020, arXiv 2003.02436): before the softmax and
after it each head becomes a weighted sum of all. Its class token comes only after the blocks that are of use here.
"""

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from models.vit import Architecture, Attention


class TalkingHeads(Attention):
    """Attention with both sums over the heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def weights(self, fits: Tensor) -> Tensor:
        """(B, heads, N, N) -> the weights in the means, of the same shape."""
        return _mixed(self.proj_w, F.softmax(_mixed(self.proj_l, fits)))


CAIT_M48_448 = Architecture(448, 16, 768, 48, 16, {}, layer_scale=True, attention=TalkingHeads)


def own_name(name: str) -> str:
    """The name that a parameter has here, of its name in timm or the original repository."""
    return name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")


def _mixed(layer: nn.Linear, heads: Tensor) -> Tensor:
    """The linear layer over the heads of (B, heads, N, N), without moving them to the last axis."""
    _, count, n, _ = heads.shape
    mixed = paddle.matmul(layer.weight, heads.flatten(2), transpose_x=True) + layer.bias.reshape([count, 1])
    return mixed.reshape([-1, count, n, n])
