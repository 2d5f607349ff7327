"""Vision Transformers as frozen extractors of features (Dosovitskiy et al. 2021, arXiv 2010.11929).

Squares of pixels, the patches, become tokens of C numbers; other tokens that are learnt stand before them. Every token
but registers has the embedding of its place added. Each block then does

    x <- x + g1 attention(norm1(x)),    x <- x + g2 mlp(norm2(x))

DeiT (Touvron et al. 2021, arXiv 2012.12877) has a token for distillation beside the class token, and no g1, g2.
DINOv2 (Oquab et al. 2023, arXiv 2304.07193) has them, the LayerScale of CaiT (`models.cait`), and may have registers
(Darcet et al. 2024, arXiv 2309.16588). Parameters have timm's names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from models.linear_maps import bicubic_matrix

EPSILON = 1e-6  # of the LayerNorms
ZERO, ONE = nn.initializer.Constant(0.0), nn.initializer.Constant(1.0)


class Attention(nn.Layer):
    """Each token becomes a mean of all, weighted by how well its query fits their keys; in each head by itself."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        _, n, c = x.shape
        q, k, v = (
            part.reshape([-1, n, self.heads, c // self.heads]).transpose([0, 2, 1, 3])  # (B, heads, N, C / heads)
            for part in paddle.split(self.qkv(x), 3, axis=-1)
        )
        # Paddle's scaled_dot_product_attention computes the same on a CPU, no sooner: of DeiT at 384x384 in 31 to 32 ms
        # on one core, this in 30 to 32. Not measured on a GPU.
        weights = self.weights(paddle.matmul(q * (c // self.heads) ** -0.5, k, transpose_y=True))
        return self.proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([-1, n, c]))

    def weights(self, fits: Tensor) -> Tensor:
        """(B, heads, N, N) -> the weights in the means, of the same shape."""
        return F.softmax(fits)


class Mlp(nn.Layer):
    """Two linear layers, four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Layer):
    """A factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = self.create_parameter([channels], default_initializer=ONE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return x * self.gamma


class Block(nn.Layer):
    """See the formula above."""

    def __init__(self, channels: int, attention: nn.Layer, layer_scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, epsilon=EPSILON) for _ in range(2))
        self.attn, self.mlp = attention, Mlp(channels)
        self.ls1, self.ls2 = (LayerScale(channels) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@dataclass(frozen=True)
class Architecture:
    """Which Vision Transformer it is.

    size: side of the square pictures that it was trained on, in pixels.
    patch: side of a patch, in pixels.
    channels: of a token.
    depth: how many blocks there are.
    heads: of the attention.
    tokens: names of the tokens before those of the patches, and how many of each.
    placed: whether embeddings of places are added to these too.
    layer_scale: whether the blocks have one.
    attention: its kind.
    """

    size: int
    patch: int
    channels: int
    depth: int
    heads: int
    tokens: dict[str, int]
    placed: bool = True
    layer_scale: bool = False
    attention: type[Attention] = Attention


DEIT_BASE_DISTILLED_384 = Architecture(384, 16, 768, 12, 12, {"cls_token": 1, "dist_token": 1})
DINOV2_S = Architecture(518, 14, 384, 12, 6, {"cls_token": 1}, layer_scale=True)
DINOV2_S_REGISTERS = Architecture(518, 14, 384, 12, 6, {"cls_token": 1, "reg_token": 4}, placed=False, layer_scale=True)


class TransformerFeatures(nn.Layer):
    """The network up to the last block that is wanted, and its final norm."""

    def __init__(self, kind: Architecture, blocks: Sequence[int], size: tuple[int, int] | None = None) -> None:
        """
        Args:
            kind: which one.
            blocks: after which the features are taken, counted from 0, rising.
            size: height and width of the pictures, multiples of the patch; None: those that it was trained on.
        """
        super().__init__()
        self.taken = list(blocks)
        self.tokens, self.placed = kind.tokens, sum(kind.tokens.values()) if kind.placed else 0
        self.grid = tuple(side // kind.patch for side in size or (kind.size, kind.size))
        self.patch_embed = nn.Layer()
        self.patch_embed.proj = nn.Conv2D(3, kind.channels, kind.patch, stride=kind.patch)
        for name, count in kind.tokens.items():
            setattr(self, name, self.create_parameter([1, count, kind.channels], default_initializer=ZERO))
        places = self.placed + math.prod(self.grid)
        self.pos_embed = self.create_parameter([1, places, kind.channels], default_initializer=ZERO)
        self.blocks = nn.LayerList(
            [
                Block(kind.channels, kind.attention(kind.channels, kind.heads), kind.layer_scale)
                for _ in range(blocks[-1] + 1)
            ]
        )
        self.norm = nn.LayerNorm(kind.channels, epsilon=EPSILON)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of the feature maps."""
        return [(self.norm.weight.shape[0], *self.grid)] * len(self.taken)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, H / patch, W / patch) after each of `blocks`: the patches' tokens, normalised."""
        x = self.patch_embed.proj(images).flatten(2).transpose([0, 2, 1])  # (B, patches, C)
        x = x + self.pos_embed[:, self.placed :]
        if self.tokens:
            tokens = paddle.concat([getattr(self, name) for name in self.tokens], axis=1)
            if self.placed:
                tokens = tokens + self.pos_embed[:, : self.placed]
            x = paddle.concat([tokens.expand([paddle.shape(x)[0], -1, -1]), x], axis=1)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taken:
                patches = self.norm(x[:, sum(self.tokens.values()) :])
                maps.append(patches.transpose([0, 2, 1]).reshape([-1, patches.shape[2], *self.grid]))
        return maps


def own_arrays(layer: TransformerFeatures, weights: dict[str, Any]) -> dict[str, Any]:
    """Arrays of timm or of the original repository as the layer has them.

    The embeddings of places are resized to the layer's grid, as timm does it: bicubic, with antialiasing. In DINOv2's
    own files with registers (`register_tokens`) the class token has a place, in timm's it is added already.
    """
    weights, channels = dict(weights), layer.norm.weight.shape[0]
    if "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
        if all(is_tokens(weights.get(name), channels) for name in ("cls_token", "pos_embed")):
            first, weights["pos_embed"] = np.split(weights["pos_embed"], [1], axis=1)
            weights["cls_token"] = weights["cls_token"] + first
    places = weights.get("pos_embed")
    if is_tokens(places, channels):
        first, patches = np.split(np.asarray(places, np.float32), [layer.placed], axis=1)
        side = math.isqrt(patches.shape[1])
        if side and side**2 == patches.shape[1] and (side, side) != layer.grid:  # a square number is a square
            rows, columns = (bicubic_matrix(side, to) for to in layer.grid)
            grid = np.einsum("hi,wj,ijc->hwc", rows, columns, patches.reshape(side, side, -1), optimize=True)
            weights["pos_embed"] = np.concatenate([first, grid.reshape(1, -1, grid.shape[2])], axis=1)
    return weights


def is_tokens(value: Any, channels: int) -> bool:
    """Whether it is an array of numbers (1, N, channels)."""
    numbers = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return numbers and value.ndim == 3 and value.shape[::2] == (1, channels)
