"""FastFlow as it is exported: the same numbers from fewer operators, of kinds that every runtime does well.

A step of `models.fastflow.FlowStep` on x = [x1, x2] is here

    h = relu(conv1(x1)),  2a = conv_a(h),  t = conv_t(h),  x2 <- x2 exp(clamp tanh(a)) + t,  and the same for x1
    [x1, x2] <- mix1([x1, x2]), mix2([x1, x2])

conv_a and conv_t are the two halves of the subnet's second convolution, with the factors 0.2 and 0.1 in their weights:
what comes out is not split. tanh(a) is 2 sigmoid(2a) - 1, which OpenVINO and Paddle do faster than a tanh. mix1 and
mix2 are scale, offset and permutation as one 1x1 convolution per half, with one number other than 0 per output, which
is exact. After the last step scale and offset alone are left: the score's mean over the channels, another 1x1
convolution, does not ask for their order. Log-determinants are for training only and are left out. Smoothing is linear
and so is the resize before it: one pair of matrices per scale does both. The backbone's BatchNorms are folded into its
convolutions.
"""

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from models.backbone import EfficientNetLite0Features, ResNetFeatures
from models.cpu.features import without_batch_norms
from models.fastflow import FastFlow, Flow, FlowStep, image_score


class InferenceForm(nn.Layer):
    """What a trained FastFlow computes from pictures; it shares the norms and fixed maps with that."""

    def __init__(self, model: FastFlow) -> None:
        super().__init__()
        self.feature_extractor, self.norms = model.feature_extractor, model.norms
        if isinstance(self.feature_extractor, ResNetFeatures | EfficientNetLite0Features):
            # Paddle's own folding takes as long at each start as all else in loading a model.
            self.feature_extractor = without_batch_norms(self.feature_extractor)
        self.resize = model.resize
        self.resize_and_smooth = nn.LayerList([model.smooth.after(resize) for resize in model.resize])
        self.flows = nn.LayerList([_Flow(flow) for flow in model.nf_flows])
        self.score_pixels = model.config.score_pixels
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> anomaly map (B, 1, H, W), the same smoothed, image score (B)."""
        maps, smoothed = [], []
        for i, x in enumerate(self.feature_extractor(images)):
            x = self.norms[i](x) if self.norms else x
            score = self.flows[i](x)  # (B, 1, h, w)
            maps.append(self.resize[i](score))
            smoothed.append(self.resize_and_smooth[i](score))
        anomaly_map = sum(maps) / len(maps)
        smoothed_map = paddle.clip(sum(smoothed) / len(smoothed), 0, 1)
        return anomaly_map, smoothed_map, image_score(anomaly_map, self.score_pixels)


class _Flow(nn.Layer):
    """A flow and `per_location_score` of what it gives."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        *first, last = flow.module_list
        self.couplings = nn.LayerList([_Couplings(step) for step in flow.module_list])
        self.mixings = nn.LayerList([_Mixing(step) for step in first])
        self.register_buffer("scale", last.global_scale.detach())
        self.register_buffer("offset", last.global_offset.detach())
        channels = last.global_scale.shape[1]
        self.exponent = _Convolution(paddle.full([1, channels, 1, 1], -0.5 / channels), paddle.zeros([1]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> 1 - exp(-0.5 mean over channels of z^2), (B, 1, H, W)."""
        x1, x2 = paddle.split(x, 2, axis=1)
        for i, mixing in enumerate(self.mixings):
            x1, x2 = mixing(self.couplings[i](x1, x2))
        z = self.couplings[-1](x1, x2) * self.scale + self.offset  # its channels in another order than the flow's
        return 1 - paddle.exp(self.exponent(paddle.square(z)))


class _Couplings(nn.Layer):
    """Both couplings of a step."""

    def __init__(self, step: FlowStep) -> None:
        super().__init__()
        self.clamp = step.clamp
        half = step.global_scale.shape[1] // 2
        convolutions = [
            (
                (conv1.weight.detach(), conv1.bias),
                ((0.2 * conv2.weight[:half]).detach(), 0.2 * conv2.bias[:half]),
                ((0.1 * conv2.weight[half:]).detach(), 0.1 * conv2.bias[half:]),
            )
            for conv1, _, conv2 in step.subnets
        ]
        # Couplings with the same weights have biases of their own: OpenVINO adds a bias within the convolution only
        # where nothing else reads it.
        self.subnets = nn.LayerList(
            [nn.LayerList([_Convolution(w, b.clone()) for w, b in convolutions[i]]) for i in (0, -1)]
        )

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Halves (B, C/2, H, W) -> both, coupled, (B, C, H, W)."""
        x2 = self._couple(self.subnets[0], x1, x2)
        return paddle.concat([self._couple(self.subnets[1], x2, x1), x2], axis=1)

    def _couple(self, subnet: nn.LayerList, condition: Tensor, x: Tensor) -> Tensor:
        conv1, conv_a, conv_t = subnet
        h = F.relu(conv1(condition))
        # s = clamp tanh(a)
        s = paddle.scale(F.sigmoid(conv_a(h)), 2 * self.clamp, -self.clamp)
        return x * paddle.exp(s) + conv_t(h)


class _Mixing(nn.Layer):
    """Scale, offset and permutation of a step, for each half of its result."""

    def __init__(self, step: FlowStep) -> None:
        super().__init__()
        scale, offset = (p.numpy().ravel() for p in (step.global_scale, step.global_offset))
        permutation = step.permutation.numpy()
        weight = np.zeros((len(scale), len(scale), 1, 1), np.float32)
        weight[np.arange(len(scale)), permutation, 0, 0] = scale[permutation]
        half = len(scale) // 2
        rows = (slice(half), slice(half, None))
        self.halves = nn.LayerList(
            [_Convolution(paddle.to_tensor(weight[r]), paddle.to_tensor(offset[permutation][r])) for r in rows]
        )

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> two halves (B, C/2, H, W)."""
        first, second = self.halves
        return first(y), second(y)


class _Convolution(nn.Layer):
    """A convolution with given weights (O, I, k, k), k odd, and bias (O) that keeps the picture's size."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.padding = weight.shape[2] // 2
        self.register_buffer("weight", weight)  # convolutions made with one tensor are exported with one
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W)."""
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)
