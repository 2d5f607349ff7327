"""The frozen feature extractor."""

import paddle
from paddle import Tensor, nn

from models import folded


class ResNet18Features(nn.Layer):
    """ResNet18 without `layer4` and `fc`, frozen and in eval mode; `FastFlow.train` keeps it there.

    The names of its parameters are those of `paddle.vision.models.resnet18`.
    """

    def __init__(self) -> None:
        super().__init__()
        resnet = paddle.vision.models.resnet18(pretrained=False)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        for parameter in self.parameters():
            parameter.stop_gradient = True
        self.eval()

    @paddle.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 64, H/4, W/4), (B, 128, H/8, W/8), (B, 256, H/16, W/16)."""
        return folded.features(self, images, self._plain)

    def _plain(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            features.append(x)
        return features
