"""FastFlow: 2D normalizing flows on the feature maps of a frozen backbone (Yu et al. 2021, arXiv 2111.07677)."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle import Tensor, nn

from deploy.common.cli import UserError
from deploy.common.tiles import SMOOTHING_SIGMA
from models.backbone import build_backbone, feature_shapes, find_backbone
from models.cpu import flow as cpu_flow
from models.linear_maps import bilinear_matrix, gaussian_matrix

if TYPE_CHECKING:
    from utils.config import Config


class Subnet(nn.Sequential):
    """A coupling's network. In training its convolutions compute in `training_dtype`; what it returns is float32."""

    training_dtype = "float32"  # or bfloat16, float16: `FastFlow.train_in`

    def forward(self, x: Tensor) -> Tensor:
        """(B, C/2, H, W) -> (B, C, H, W)."""
        if not self.training or self.training_dtype == "float32":
            return super().forward(x)
        with paddle.amp.auto_cast(dtype=self.training_dtype):
            y = super().forward(x)
        return y.astype("float32")


class FlowStep(nn.Layer):
    """Two affine couplings, a scale and offset per channel, and a fixed permutation.

    On x = [x1, x2], split in the middle of the channels (the paper's 2D flow; RealNVP's affine coupling):

        [a, t] = 0.1 subnet(x1),  s = clamp tanh(a),  y2 = x2 exp(s) + t
        [a, t] = 0.1 subnet_2(y2),  s = clamp tanh(a),  y1 = x1 exp(s) + t
        y = permute([y1, y2] global_scale + global_offset)

    log |det dy/dx| = sum of both s over channels and pixels + H W sum(log global_scale).
    The factor 0.1 and the tanh clamp are those of FrEIA's AllInOneBlock, from which the published model comes. There
    subnet_2 is subnet, though its files hold another one; the paper has two.
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        hidden_ratio: float,
        clamp: float,
        permutation: np.ndarray,
        share_subnet: bool = True,
        subnet_gain: float = 1.0,
    ) -> None:
        super().__init__()
        half, hidden = channels // 2, _hidden(channels, hidden_ratio)
        self.clamp = clamp
        for name in ("subnet",) if share_subnet else ("subnet", "subnet_2"):
            subnet = Subnet(
                nn.Conv2D(half, hidden, kernel, padding="same"),
                nn.ReLU(),
                nn.Conv2D(hidden, channels, kernel, padding="same"),
            )
            for conv in (subnet[0], subnet[2]):
                conv.weight.set_value(subnet_gain * conv.weight)
            setattr(self, name, subnet)
        one, zero = nn.initializer.Constant(1.0), nn.initializer.Constant(0.0)
        self.global_scale = self.create_parameter([1, channels, 1, 1], default_initializer=one)
        self.global_offset = self.create_parameter([1, channels, 1, 1], default_initializer=zero)
        # y[:, i] = x[:, permutation[i]]
        self.register_buffer("permutation", paddle.to_tensor(permutation, "int64"), persistable=False)

    @property
    def subnets(self) -> list[Subnet]:
        """The one that both couplings share, or that of the first and that of the second."""
        return [self.subnet, self.subnet_2] if hasattr(self, "subnet_2") else [self.subnet]

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> y (B, C, H, W), log-det (B); where places are `kept` (see `FastFlow.latents`) theirs alone.

        The determinant is that of the coupling at each place, so the sum over some places is what these contribute.
        """
        first, second = self.subnets[0], self.subnets[-1]
        x1, x2 = paddle.split(x, 2, axis=1)  # (B, C/2, H, W)
        x2, log_det2 = self._couple(first, x1, x2, kept)
        x1, log_det1 = self._couple(second, x2, x1, kept)
        y = paddle.concat([x1, x2], axis=1) * self.global_scale + self.global_offset
        pixels = float(x.shape[2] * x.shape[3]) if kept is None else kept.sum(axis=[1, 2, 3])
        log_det = log_det1 + log_det2 + pixels * paddle.log(self.global_scale).sum()
        return paddle.index_select(y, self.permutation, axis=1), log_det

    def inverse(self, y: Tensor) -> Tensor:
        """The x that `forward` maps to y, (B, C, H, W)."""
        x = paddle.index_select(y, paddle.argsort(self.permutation), axis=1)
        x1, x2 = paddle.split((x - self.global_offset) / self.global_scale, 2, axis=1)
        s, t = self._scale_shift(self.subnets[-1], x2)
        x1 = (x1 - t) * paddle.exp(-s)
        s, t = self._scale_shift(self.subnets[0], x1)
        x2 = (x2 - t) * paddle.exp(-s)
        return paddle.concat([x1, x2], axis=1)

    def _couple(self, subnet: Subnet, condition: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        s, t = self._scale_shift(subnet, condition)
        return x * paddle.exp(s) + t, (s if kept is None else s * kept).sum(axis=[1, 2, 3])

    def _scale_shift(self, subnet: Subnet, condition: Tensor) -> tuple[Tensor, Tensor]:
        a, t = paddle.split(0.1 * subnet(condition), 2, axis=1)
        return self.clamp * paddle.tanh(a), t


class Flow(nn.Layer):
    """A chain of flow steps on one feature map."""

    def __init__(self, channels: int, config: "Config", random: np.random.Generator) -> None:
        super().__init__()
        self.module_list = nn.LayerList()
        start = {"share_subnet": config.share_subnet, "subnet_gain": config.subnet_gain}
        for kernel in _kernels(config):
            permutation = random.permutation(channels)
            self.module_list.append(FlowStep(channels, kernel, config.hidden_ratio, config.clamp, permutation, **start))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> z (B, C, H, W), log-det (B); `_plain` says what is computed, `models.cpu` how on a CPU.

        The log-det of places that are `kept` alone is something that `models.cpu` does not know.
        """
        if kept is not None:
            return self._plain(x, kept)
        return cpu_flow.flow(x, self.module_list, self._plain, self.training)

    def _plain(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = 0.0
        for step in self.module_list:
            x, step_log_det = step(x, kept)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """The x that `forward` maps to z, (B, C, H, W)."""
        for step in reversed(list(self.module_list)):
            z = step.inverse(z)
        return z


class FeatureNorm(nn.BatchNorm2D):
    """BatchNorm of frozen features; in data-parallel training its statistics are those of the global batch.

    Features are constants, so the statistics need no gradient and a plain exchange of sums will do:
    `sum_over_processes`, if it is set, replaces each of some tensors by its sum over the processes.
    """

    sum_over_processes: Callable[[Sequence[Tensor]], None] | None = None

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape; in training statistics are of the places `kept`, see `FastFlow.latents`."""
        if not self.training or (self.sum_over_processes is None and kept is None):
            return nn.BatchNorm2D.forward(self, x)  # Paddle 2.6 cannot export super()
        shape = [1, -1, 1, 1]
        exchange = self.sum_over_processes or (lambda sums: None)

        def counted(values: Tensor) -> Tensor:
            return values if kept is None else values * kept

        with paddle.no_grad():
            places = paddle.full([1], x.size / x.shape[1]) if kept is None else kept.sum().reshape([1])
            sums = [counted(x).sum(axis=[0, 2, 3]), places]
            exchange(sums)
            total, count = sums
            mean = total / count  # (C,)
            squares = counted(paddle.square(x - mean.reshape(shape))).sum(axis=[0, 2, 3])
            exchange([squares])
            variance = squares / count
            self._mean.set_value(self._momentum * self._mean + (1 - self._momentum) * mean)
            self._variance.set_value(self._momentum * self._variance + (1 - self._momentum) * variance)
            scaled = (x - mean.reshape(shape)) * paddle.rsqrt(variance + self._epsilon).reshape(shape)
        return scaled * self.weight.reshape(shape) + self.bias.reshape(shape)


class BothAxes(nn.Layer):
    """A fixed linear map of the rows and one of the columns: R (C A^T)^T = R A C^T for each map A.

    The constants stand on the left: with oneDNN on, Paddle Inference 3.3.1 reads past a constant matrix on the right
    of a batch of two or more, and returns other numbers or crashes.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """R (H, h) and C (W, w)."""
        super().__init__()
        self.register_buffer("rows", paddle.to_tensor(rows), persistable=False)
        self.register_buffer("columns", paddle.to_tensor(columns), persistable=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, 1, H, W)."""
        return paddle.matmul(self.rows, paddle.matmul(self.columns, maps, transpose_y=True), transpose_y=True)

    def after(self, first: "BothAxes") -> "BothAxes":
        """The map that does `first` and then this one."""
        both = ((self.rows, first.rows), (self.columns, first.columns))
        return BothAxes(*((b.numpy().astype(np.float64) @ a.numpy()).astype(np.float32) for b, a in both))


class FastFlow(nn.Layer):
    """Frozen backbone, and per scale a BatchNorm and a flow to a standard normal z."""

    def __init__(self, config: "Config", largest: float = math.inf) -> None:
        """Channels and sizes of the feature maps are the backbone's.

        Args:
            config: of the model.
            largest: how many numbers the flows' convolutions may have.

        Raises:
            UserError: no such backbone or feature maps, the config says something else of them than there is, or the
                flows are larger.
        """
        super().__init__()
        self.config = config
        random = np.random.default_rng(config.seed)
        self.feature_extractor = build_backbone(config.backbone_name, config.scales, config.blocks, config.size)
        shapes = feature_shapes(self.feature_extractor, config.size)  # (C, h, w) per scale
        channels = [c for c, _, _ in shapes]
        _check_channels(channels, config)
        if _flow_numbers(channels, config) > largest:
            sizes = f"flow_step {config.flow_step} and hidden_ratio {config.hidden_ratio:g}"
            raise UserError(f"{sizes} make a larger model than there is")
        self.norms = nn.LayerList(
            [FeatureNorm(c, momentum=config.momentum) for c, _, _ in shapes] if config.use_norm else []
        )
        self.nf_flows = nn.LayerList([Flow(c, config, random) for c, _, _ in shapes])
        height, width = config.size
        self.resize = nn.LayerList(
            [BothAxes(bilinear_matrix(h, height), bilinear_matrix(w, width)) for _, h, w in shapes]
        )
        self.smooth = BothAxes(gaussian_matrix(height, SMOOTHING_SIGMA), gaussian_matrix(width, SMOOTHING_SIGMA))
        for name, parameter in self.named_parameters():
            parameter.name = name  # the optimizer's state is stored under these names: any process can resume

    @classmethod
    def blank(cls, config: "Config", largest: float = math.inf) -> "FastFlow":
        """A model with zeros for weights, to be filled from a checkpoint; see `__init__`.

        It draws no random numbers, which is most of the work of making a model. A new training draws those of the
        backbone too, though it drops them: the flows' start comes after them in Paddle's stream, and with another start
        a training would give other results. Layers that another thread makes meanwhile get zeros too.
        """
        zeros = nn.initializer.Constant(0.0)
        nn.initializer.set_global_initializer(zeros, zeros)
        try:
            return cls(config, largest)
        finally:
            nn.initializer.set_global_initializer(None)

    def train(self) -> None:
        """Train the norms and flows; the backbone stays in eval mode, its BatchNorm statistics are ImageNet's."""
        super().train()
        self.feature_extractor.eval()

    def train_in(self, dtype: str) -> None:
        """Let the subnets' convolutions compute in float32, bfloat16 or float16 in training; eval mode is float32.

        Parameters and their gradients, scales, log-dets and losses are float32 with any of them.
        """
        for layer in self.sublayers():
            if isinstance(layer, Subnet):
                layer.training_dtype = dtype

    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(p.size for p in self.parameters() if not p.stop_gradient)

    def latents(
        self, features: Sequence[Tensor], noise: Sequence[Tensor] = (), kept: Sequence[Tensor] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """Features (B, C, h, w) of each scale -> (z (B, C, h, w), log-det (B)) of each scale.

        `noise`, if there is any, has their shapes and is added to what the norms make of them. `kept`, if there are
        any, are (B, 1, h, w) of 1 at the places that are learnt from and 0 elsewhere: statistics of the norms and
        log-dets are theirs alone.
        """
        places = kept or [None] * len(features)
        if self.norms:
            features = [self.norms[i](x, places[i]) for i, x in enumerate(features)]
        if noise:
            features = [x + n for x, n in zip(features, noise, strict=True)]
        return [self.nf_flows[i](x, places[i]) for i, x in enumerate(features)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> what `score` returns."""
        return self.score(self.feature_extractor(images))

    def score(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features -> anomaly map (B, 1, H, W), the same smoothed, image score (B); all in [0, 1]."""
        anomaly_map = self.anomaly_map(features)
        smoothed = paddle.clip(self.smooth(anomaly_map), 0, 1)  # of ones it would be a little more, by rounding
        return anomaly_map, smoothed, image_score(anomaly_map, self.config.score_pixels)

    def anomaly_map(self, features: Sequence[Tensor]) -> Tensor:
        """Features -> anomaly map (B, 1, H, W) in [0, 1], as it is before it is smoothed."""
        maps = []
        for i, (z, _) in enumerate(self.latents(features)):
            maps.append(self.resize[i](per_location_score(z)))  # (B, 1, H, W)
        return sum(maps) / len(maps)

    @paddle.no_grad()
    def raw_maps(self, images: np.ndarray) -> np.ndarray:
        """Normalised images (B, 3, H, W) -> their anomaly maps before smoothing, (B, H, W), computed in eval mode."""
        self.eval()
        return self.anomaly_map(self.feature_extractor(paddle.to_tensor(images)))[:, 0].numpy()


def _hidden(channels: int, ratio: float) -> int:
    """Hidden channels of a coupling's network."""
    return int(channels // 2 * ratio)


def _kernels(config: "Config") -> list[int]:
    """Of the convolutions of each step: the paper alternates 3x3 and 1x1, and uses 3x3 only for ResNet18."""
    return [3 if config.conv3x3_only or step % 2 == 0 else 1 for step in range(config.flow_step)]


def _flow_numbers(channels: Sequence[int], config: "Config") -> int:
    """How many numbers the convolutions of the flows on maps of so many channels have."""
    areas = sum(kernel**2 for kernel in _kernels(config)) * (1 if config.share_subnet else 2)
    return areas * sum(_hidden(c, config.hidden_ratio) * (c // 2 + c) for c in channels)


def _check_channels(channels: Sequence[int], config: "Config") -> None:
    """Compare the channels of the feature maps with what the config says of them and with what a flow needs."""
    name = config.backbone_name
    if config.channels not in (None, channels):
        raise UserError(
            f"config: channels must be {channels} with {name} and these {find_backbone(name).key}, not "
            f"{config.channels}; leave them out (-o channels=null)"
        )
    if any(c % 2 for c in channels):
        raise UserError(f"backbone {name}: has {channels} channels, and a flow needs an even number")
    if int(min(channels) // 2 * config.hidden_ratio) < 1:
        raise UserError(f"config: hidden_ratio {config.hidden_ratio} leaves no hidden channel")


def negative_log_likelihood(latents: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Tensor] = ()) -> Tensor:
    """The training loss, a scalar: sum over scales of the mean over the batch of

        (0.5 ||z||^2 - log |det dz/dx|) / (C H W)

    which is -log p(x) of a standard normal z per dimension, without the constant 0.5 log(2 pi). Where places are
    `kept`, as in `FastFlow.latents`, the sums are over these, and their number takes the place of B H W.
    """
    loss = 0.0
    for i, (z, log_det) in enumerate(latents):
        squares = paddle.square(z) * kept[i] if kept else paddle.square(z)
        # An axis at a time: all at once Paddle's CPU kernel adds up float32 numbers one by one, 3e-4 off at batch 32.
        squares = squares.sum(3).sum(2).sum(1).sum()
        if kept:
            loss = loss + (0.5 * squares - log_det.sum()) / (z.shape[1] * kept[i].sum())
        else:
            loss = loss + 0.5 * (squares / z.size) - log_det.mean() / math.prod(z.shape[1:])
    return loss


def image_score(anomaly_map: Tensor, pixels: int) -> Tensor:
    """Anomaly maps a (B, 1, H, W) -> (B): with a sorted from the largest value on, (a_1 + ... + a_pixels) / pixels.

    With one pixel that is the published score, the maximum; see `Config.score_pixels`.
    """
    if pixels == 1:
        return anomaly_map.max(axis=[1, 2, 3])
    largest, _ = paddle.topk(anomaly_map.flatten(1), pixels, sorted=False)
    # A product in the place of a mean, at which Paddle Inference with oneDNN prints a line each time.
    return paddle.matmul(paddle.ones([1, pixels]), largest, transpose_y=True)[0] / pixels


def per_location_score(z: Tensor) -> Tensor:
    """z (B, C, h, w) -> 1 - exp(-0.5 mean over channels of z^2), (B, 1, h, w) in [0, 1)."""
    return 1 - paddle.exp(-0.5 * paddle.square(z).mean(axis=1, keepdim=True))
