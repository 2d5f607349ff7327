"""The published reproduction in straightforward Paddle: what the benchmark calls "published".

Written from the facts in which the published graph and evaluation differ from ours in how they compute, not in what:
channel halves by slicing, the permutation as a 1x1 convolution, squares as `** 2`, align-corners interpolation, one
Gaussian filter a picture on the CPU, scores in Python lists, scikit-learn's AUROC. It has no cache, so pictures are
read and features computed in every epoch. The published steps also hold a second, unused subnet; it takes no part in
any computation and is left out. tests/test_benchmarks.py shows that the numbers are those of `models.fastflow`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from datasets.mvtec import GroundTruth, read_batches
from deploy.common.imaging import normalise
from utils.config import Config

SIGMA = 6.0  # pixels, of the map's smoothing


class Step(nn.Layer):
    """Two couplings with a shared subnet, scale and offset, permutation; formula in `models.fastflow.FlowStep`."""

    def __init__(self, channels: int, kernel: int, hidden_ratio: float, clamp: float) -> None:
        super().__init__()
        half = channels // 2
        hidden = int(half * hidden_ratio)
        self.clamp = clamp
        self.subnet = nn.Sequential(
            nn.Conv2D(half, hidden, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2D(hidden, channels, kernel, padding="same"),
        )
        one, zero = nn.initializer.Constant(1.0), nn.initializer.Constant(0.0)
        self.global_scale = self.create_parameter([1, channels, 1, 1], default_initializer=one)
        self.global_offset = self.create_parameter([1, channels, 1, 1], default_initializer=zero)
        self.w_perm = self.create_parameter([channels, channels, 1, 1])
        self.w_perm.stop_gradient = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> y (B, C, H, W), log-det (B)."""
        half = x.shape[1] // 2
        x1, x2 = x[:, :half], x[:, half:]  # (B, C/2, H, W)
        x2, log_det2 = self._couple(x2, self.subnet(x1) * 0.1)
        x1, log_det1 = self._couple(x1, self.subnet(x2) * 0.1)
        y = paddle.concat([x1, x2], axis=1) * self.global_scale + self.global_offset
        log_det = log_det1 + log_det2 + x.shape[2] * x.shape[3] * paddle.sum(paddle.log(self.global_scale))
        return F.conv2d(y, self.w_perm), log_det

    def _couple(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1]
        s = self.clamp * paddle.tanh(a[:, :half])
        return x * paddle.exp(s) + a[:, half:], paddle.sum(s, axis=[1, 2, 3])


class Flow(nn.Layer):
    """A chain of steps on one feature map."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        kernels = [3 if config.conv3x3_only or step % 2 == 0 else 1 for step in range(config.flow_step)]
        steps = [Step(channels, kernel, config.hidden_ratio, config.clamp) for kernel in kernels]
        self.module_list = nn.LayerList(steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> z (B, C, H, W), log-det (B)."""
        total = paddle.zeros([x.shape[0]])
        for step in self.module_list:
            x, log_det = step(x)
            total = total + log_det
        return x, total


class Backbone(nn.Layer):
    """Paddle's ResNet18 as it stands, without `layer4` and `fc`, frozen."""

    def __init__(self) -> None:
        super().__init__()
        resnet = paddle.vision.models.resnet18(pretrained=False)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        for parameter in self.parameters():
            parameter.stop_gradient = True

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 64, H/4, W/4), (B, 128, H/8, W/8), (B, 256, H/16, W/16)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = [self.layer1(x)]
        features.append(self.layer2(features[-1]))
        features.append(self.layer3(features[-1]))
        return features


class PublishedFastFlow(nn.Layer):
    """Backbone, a BatchNorm and a flow per scale, the loss in training mode and the anomaly map in eval mode."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.size = config.size
        self.feature_extractor = Backbone()
        self.norms = nn.LayerList([nn.BatchNorm2D(c, momentum=config.momentum) for c in config.channels])
        self.nf_flows = nn.LayerList([Flow(c, config) for c in config.channels])

    def set_published_state(self, state: dict[str, np.ndarray]) -> None:
        """Take the arrays of `utils.checkpoint.published_state`; `w_perm_inv` is not needed here."""
        missing, _ = self.set_state_dict(state)
        if missing:
            raise ValueError(f"the published graph lacks {missing}")

    def train(self) -> None:
        """Training mode; the frozen backbone stays in eval mode."""
        super().train()
        self.feature_extractor.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> the loss in training mode, else anomaly maps (B, 1, H, W)."""
        return self.from_features(self.feature_extractor(images))

    def from_features(self, features: Sequence[Tensor]) -> Tensor:
        """The same from features (B, C, h, w) of each scale."""
        latents = [flow(norm(x)) for flow, norm, x in zip(self.nf_flows, self.norms, features, strict=True)]
        return self._loss(latents) if self.training else self._map(latents)

    def _loss(self, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
        loss = 0
        for z, log_det in latents:
            dimensions = z.shape[1] * z.shape[2] * z.shape[3]
            loss = loss + paddle.mean(0.5 * paddle.sum(z**2, axis=[1, 2, 3]) - log_det) / dimensions
        return loss

    def _map(self, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
        maps = []
        for z, _ in latents:
            score = 1 - paddle.exp(-0.5 * paddle.mean(z**2, axis=1, keepdim=True))
            maps.append(F.interpolate(score, size=list(self.size), mode="bilinear", align_corners=True))
        return paddle.mean(paddle.stack(maps, axis=-1), axis=-1)


class ListEvaluation:
    """Image and pixel AUROC by way of Python lists."""

    def __init__(self) -> None:
        self.image_scores: list[float] = []
        self.image_truth: list[int] = []
        self.pixel_scores: list[float] = []
        self.pixel_truth: list[int] = []

    def add(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """One picture: its raw map (H, W) float32 and its mask (H, W) bool."""
        self.image_scores.append(float(anomaly_map.max()))
        self.image_truth.append(int(mask.max()))
        self.pixel_scores.extend(gaussian_filter(anomaly_map, sigma=SIGMA).ravel().tolist())
        self.pixel_truth.extend(mask.astype(int).ravel().tolist())

    def measure(self) -> tuple[float, float]:
        """Image and pixel AUROC."""
        return (
            float(roc_auc_score(self.image_truth, self.image_scores)),
            float(roc_auc_score(self.pixel_truth, self.pixel_scores)),
        )


def train_epoch(
    model: PublishedFastFlow, optimizer: paddle.optimizer.Optimizer, paths: Sequence[Path], batch_size: int
) -> float:
    """One pass over all pictures in random order, which are read and go through the backbone; the mean loss."""
    model.train()
    total = 0.0
    shuffled = [paths[i] for i in np.random.permutation(len(paths))]
    for pictures in read_batches(shuffled, batch_size, model.size):
        loss = model(paddle.to_tensor(normalise(pictures)))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        total += loss.item() * len(pictures)
    return total / len(paths)


@paddle.no_grad()
def evaluate(
    model: PublishedFastFlow, paths: Sequence[Path], truth: GroundTruth, batch_size: int
) -> tuple[float, float]:
    """Image and pixel AUROC of a test set whose defects all have masks."""
    model.eval()
    lists = ListEvaluation()
    done = 0
    for pictures in read_batches(paths, batch_size, model.size):
        for anomaly_map in model(paddle.to_tensor(normalise(pictures))).numpy():
            lists.add(anomaly_map[0], truth.masks[done])
            done += 1
    return lists.measure()
