"""Frozen feature extractors, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import paddle
from paddle import Tensor, nn
from paddle.vision import models as vision

from deploy.common.cli import UserError
from models.cpu import resnet as cpu_resnet


@dataclass(frozen=True)
class Backbone:
    """What stands behind a `backbone_name`.

    build: makes the layer. It maps normalised images (B, 3, H, W) to a list of feature maps (B, C, h, w), finest first,
        C even; any h and w will do. `build_backbone` freezes it.
    weights: address and MD5 of the official file of weights, with the layer's parameter names; None if there is none.
    left_out: what names in weight files may start with though the layer has no such part.
    """

    build: Callable[[], nn.Layer]
    weights: tuple[str, str] | None = None
    left_out: tuple[str, ...] = ()


class ResNetFeatures(nn.Layer):
    """A ResNet of paddle.vision without `layer4` and `fc`; the names of its parameters stay."""

    def __init__(self, resnet: nn.Layer) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, H/4, W/4), (B, 2C, H/8, W/8), (B, 4C, H/16, W/16), sizes rounded up.

        C is 64 with basic blocks (ResNet18 and 34), 256 with bottleneck blocks. `_plain` says what is computed,
        `models.cpu` how on a CPU.
        """
        return cpu_resnet.features(self, images, self._plain)

    def _plain(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            features.append(x)
        return features


def resnet(name: str) -> Backbone:
    """The ResNet of paddle.vision that has this name there, with Paddle's official weights."""
    return Backbone(
        build=lambda: ResNetFeatures(getattr(vision, name)(pretrained=False)),
        weights=vision.resnet.model_urls[name],
        left_out=("layer4.", "fc."),
    )


# docs/en/development.md shows how to add one.
BACKBONES: dict[str, Backbone] = {
    "resnet18": resnet("resnet18"),
    "resnet34": resnet("resnet34"),
    "resnet50": resnet("resnet50"),
    "wide_resnet50_2": resnet("wide_resnet50_2"),
}


def find_backbone(name: str) -> Backbone:
    """The registry's entry.

    Raises:
        UserError: no such entry.
    """
    if name not in BACKBONES:
        raise UserError(f"config: backbone_name must be one of {', '.join(BACKBONES)}, not {name!r}")
    return BACKBONES[name]


def build_backbone(name: str) -> nn.Layer:
    """The layer, frozen: in eval mode and without gradients; `FastFlow.train` keeps it there.

    Raises:
        UserError: no such backbone.
    """
    backbone = find_backbone(name).build()
    for parameter in backbone.parameters():
        parameter.stop_gradient = True  # so nothing is recorded of a pass over pictures
    backbone.eval()
    return backbone


@paddle.no_grad()
def feature_shapes(backbone: nn.Layer, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(C, h, w) of the feature maps of a picture of this height and width, by a pass over an empty one."""
    return [tuple(x.shape[1:]) for x in backbone(paddle.zeros([1, 3, *size]))]
