"""What the offline start of the backbone promises."""

import numpy as np
import paddle
import pytest
from paddle import nn

from models.backbone import build_backbone
from models.offline_start import calibrated_start

NORMS = {"resnet18": 15, "resnet34": 29, "resnet50": 43, "wide_resnet50_2": 43, "efficientnet_lite0": 48}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Five pictures (5, 3, 64, 64): a bright and a dark half with some texture."""
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((5, 3, 64, 64)).astype("float32") * 0.2
    pictures[..., 32:] += 2.0
    return pictures


def started(images: np.ndarray, seed: int = 0, name: str = "resnet18") -> nn.Layer:
    backbone = build_backbone(name)
    calibrated_start(backbone, images, seed)
    return backbone


def test_same_seed_and_images_give_the_same_weights(images):
    paddle.seed(1)
    first = started(images).state_dict()
    paddle.seed(2)  # Paddle's own random state plays no part
    again, other = started(images).state_dict(), started(images, seed=1).state_dict()
    for name, value in first.items():
        np.testing.assert_array_equal(value.numpy(), again[name].numpy(), err_msg=name)
    assert not np.array_equal(first["conv1.weight"].numpy(), other["conv1.weight"].numpy())


def test_a_transformer_starts_from_the_seed_alone(images):
    def start():
        backbone = build_backbone("dinov2_vits14", blocks=[1], size=(56, 56))
        calibrated_start(backbone, images, seed=0)
        return backbone

    paddle.seed(1)
    first = start()
    paddle.seed(2)
    for name, value in start().state_dict().items():
        np.testing.assert_array_equal(value.numpy(), first.state_dict()[name].numpy(), err_msg=name)
    maps = first(paddle.to_tensor(images[..., :56, :56]))
    assert maps[0].std([2, 3]).min().item() > 0.01  # places differ
    assert maps[0].std(0).mean().item() > 0.01  # and pictures


def test_names_and_shapes_are_those_of_resnet18(images):
    shapes = {name: value.shape for name, value in build_backbone("resnet18").state_dict().items()}
    assert {name: value.shape for name, value in started(images).state_dict().items()} == shapes


@pytest.mark.parametrize("name", NORMS)
def test_every_batchnorm_gives_mean_zero_and_variance_one(images, name):
    backbone, checked = started(images, name=name), []

    def check(norm, _, y):
        np.testing.assert_allclose(y.mean([0, 2, 3]).numpy(), 0, atol=1e-3)
        nearly_one = norm._variance / (norm._variance + norm._epsilon)
        np.testing.assert_allclose(y.var([0, 2, 3], unbiased=False).numpy(), nearly_one.numpy(), atol=1e-3)
        checked.append(1)

    norms = [layer for layer in backbone.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    for norm in norms:
        norm.register_forward_post_hook(check)
    backbone(paddle.to_tensor(images))
    assert len(checked) == len(norms) == NORMS[name]


def test_statistics_of_many_pixels_are_exact():
    images = np.random.default_rng(0).standard_normal((16, 3, 128, 128)).astype("float32")
    layer = nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4))
    calibrated_start(layer, images, 0)
    y = layer[0](paddle.to_tensor(images)).numpy().astype("float64")
    np.testing.assert_allclose(layer[1]._mean.numpy(), y.mean((0, 2, 3)), atol=1e-7)
    np.testing.assert_allclose(layer[1]._variance.numpy(), y.var((0, 2, 3)), rtol=1e-6)


def test_features_do_not_depend_on_the_contrast_of_the_data(images):
    dim = (images * 0.25).astype("float32")
    for bright, faint in zip(
        started(images)(paddle.to_tensor(images)), started(dim)(paddle.to_tensor(dim)), strict=True
    ):
        assert float((bright - faint).abs().max()) < 0.02


def test_filters_are_smooth_where_they_have_an_extent(images):
    for name, kernels in started(images).state_dict().items():
        if len(kernels.shape) == 4 and kernels.shape[-1] > 1:
            kernels = kernels.numpy()
            left, right = kernels[..., :-1].ravel(), kernels[..., 1:].ravel()
            assert np.corrcoef(left, right)[0, 1] > 0.6, name  # white noise: 0


def test_kernels_may_have_any_shape(images):
    layer = nn.Sequential(nn.Conv2D(3, 4, (1, 7)), nn.Conv2D(4, 4, (3, 1), groups=4), nn.BatchNorm2D(4))
    calibrated_start(layer, images, 0)
    y = layer(paddle.to_tensor(images))
    np.testing.assert_allclose(y.var([0, 2, 3], unbiased=False).numpy(), 1, atol=1e-2)


def test_the_start_leaves_the_backbone_ready_to_use(images):
    backbone = started(images)
    assert not backbone.training
    before = backbone.bn1._mean.numpy()
    backbone(paddle.to_tensor(images + 1))  # another picture no longer moves the statistics
    np.testing.assert_array_equal(before, backbone.bn1._mean.numpy())
