"""The model's maths, each piece against its definition."""

import dataclasses

import numpy as np
import paddle
import pytest
from paddle import nn
from scipy import ndimage

from deploy.common.cli import UserError
from models.backbone import ResNetFeatures, feature_shapes
from models.export_form import InferenceForm
from models.fastflow import FastFlow, Flow, FlowStep, image_score, negative_log_likelihood, per_location_score
from utils.config import load_config
from utils.training import build_optimizer, training_step

PATH = "configs/resnet18.yaml"


def perturbed(layer, seed=0):
    """Weights far from their start, so that scales, shifts and offsets all matter."""
    random = np.random.default_rng(seed)
    for name, parameter in layer.named_parameters():
        z = random.standard_normal(parameter.shape)
        if name.endswith("global_scale"):
            value = np.exp(0.3 * z)
        elif name.endswith("global_offset"):
            value = 0.5 * z
        else:
            value = z / np.sqrt(np.prod(parameter.shape[1:]))  # a bias: standard deviation 1
        parameter.set_value(value.astype(np.float32))
    return layer


def step(channels=4, kernel=3, clamp=2.0, hidden_ratio=1.06, **options):
    permutation = np.random.default_rng(3).permutation(channels)
    return perturbed(FlowStep(channels, kernel, hidden_ratio, clamp, permutation, **options))


def flow(channels=4, **overrides):
    config = load_config(PATH, [f"{key}={value}" for key, value in overrides.items()])
    return perturbed(Flow(channels, config, np.random.default_rng(3)))


LAYERS = {
    "step, 3x3": step,
    "step, 1x1": lambda: step(kernel=1),
    "step, clamp 0.5": lambda: step(clamp=0.5),
    "step, 6 channels": lambda: step(6),
    "flow, 3x3": flow,
    "flow, 3x3 and 1x1": lambda: flow(conv3x3_only=False),
    "flow, 2 steps": lambda: flow(flow_step=2),
    "step, a subnet each": lambda: step(share_subnet=False),
    "flow, a subnet each": lambda: flow(share_subnet=False, conv3x3_only=False),
}


@paddle.no_grad()
def test_scores_of_what_is_as_odd_as_can_be_are_1_and_not_more(monkeypatch):
    """The smoothing of ones is a little more than 1, by rounding; thresholds are made of scores, and are at most 1."""
    model = FastFlow(load_config(PATH, ["input_size=256", "flow_step=1", "pretrained=offline"]))
    model.eval()
    assert model.smooth(paddle.ones([1, 1, 256, 256])).max().item() > 1
    features = [paddle.full([1, *shape], 1e4) for shape in feature_shapes(model.feature_extractor, (256, 256))]
    monkeypatch.setattr(ResNetFeatures, "forward", lambda *_: features)
    for form in (model, InferenceForm(model)):
        anomaly_map, smoothed, score = form(paddle.zeros([1, 3, 256, 256]))
        assert anomaly_map.min().item() == score.item() == smoothed.max().item() == 1


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    return request.param()


def channels(layer):
    return layer.parameters()[0].shape[1]  # of global_scale


def noise(*shape, seed=1):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@paddle.no_grad()
def test_inverse_undoes_forward(layer):
    x = noise(3, channels(layer), 5, 7)
    y, _ = layer(x)
    assert np.abs(y.numpy() - x.numpy()).max() > 0.5  # it does something
    assert np.abs(layer.inverse(y).numpy() - x.numpy()).max() < 1e-4
    assert np.abs(layer(layer.inverse(x))[0].numpy() - x.numpy()).max() < 1e-4


def test_log_det_is_that_of_autograds_jacobian(layer):
    x = noise(2, channels(layer), 2, 2)
    x.stop_gradient = False
    y, log_det = layer(x)
    assert log_det.shape == [2]
    for b in range(2):
        outputs = y[b].flatten()
        rows = [paddle.grad(outputs[i], x, retain_graph=True)[0].numpy().reshape(2, -1) for i in range(len(outputs))]
        jacobian = np.stack(rows).astype(np.float64)  # (outputs, picture, inputs)
        assert (jacobian[:, 1 - b] == 0).all()  # pictures do not mix
        _, expected = np.linalg.slogdet(jacobian[:, b])
        assert abs(expected) > 0.05
        assert log_det[b].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("share_subnet", [True, False])
def test_a_step_is_its_definition(share_subnet):
    """Written out in numpy, the subnets taken from the layer."""
    layer, x = step(share_subnet=share_subnet), noise(2, 4, 3, 3)

    def couple(subnet, condition, value):
        a = 0.1 * subnet(paddle.to_tensor(condition)).numpy()
        s, t = 2.0 * np.tanh(a[:, :2]), a[:, 2:]
        return value * np.exp(s) + t

    x1, x2 = x.numpy()[:, :2], x.numpy()[:, 2:]
    x2 = couple(layer.subnet, x1, x2)
    x1 = couple(layer.subnet if share_subnet else layer.subnet_2, x2, x1)
    y = np.concatenate([x1, x2], axis=1) * layer.global_scale.numpy() + layer.global_offset.numpy()
    y = y[:, layer.permutation.numpy()]
    np.testing.assert_allclose(layer(x)[0].numpy(), y, rtol=1e-5, atol=1e-5)


def test_a_fresh_step_scales_by_one_and_shifts_by_zero():
    layer = FlowStep(4, 3, 1.06, 2.0, np.arange(4))
    assert (layer.global_scale.numpy() == 1).all()
    assert (layer.global_offset.numpy() == 0).all()


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_the_subnet_has_the_published_widths(config, channels):
    for step_ in Flow(channels, config, np.random.default_rng(0)).module_list:
        first, _, last = step_.subnet
        hidden = int(channels // 2 * 1.06)
        assert first.weight.shape == [hidden, channels // 2, 3, 3]
        assert last.weight.shape == [channels, hidden, 3, 3]
        assert first.bias.shape == [hidden]


@pytest.mark.parametrize(("conv3x3_only", "kernels"), [("True", [3, 3, 3, 3]), ("False", [3, 1, 3, 1])])
def test_every_second_step_is_1x1_unless_3x3_only(conv3x3_only, kernels):
    layers = flow(conv3x3_only=conv3x3_only).module_list
    assert [s.subnet[0].weight.shape[-1] for s in layers] == kernels
    assert [s.subnet[2].weight.shape[-1] for s in layers] == kernels


def test_permutations_come_from_the_seed_and_differ(config):
    def permutations(seed):
        model = FastFlow(load_config(PATH, [f"seed={seed}"]))
        return [s.permutation.numpy() for f in model.nf_flows for s in f.module_list]

    first, again, other = permutations(0), permutations(0), permutations(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert all(sorted(p) == list(range(len(p))) for p in first)


def test_subnets_start_with_the_gain_times_the_published_start():
    def start(gain):
        paddle.seed(0)
        return FlowStep(4, 3, 1.06, 2.0, np.arange(4), share_subnet=False, subnet_gain=gain).parameters()

    for small, whole in zip(start(0.4), start(1.0), strict=True):
        factor = 0.4 if "conv" in whole.name and whole.ndim == 4 else 1
        np.testing.assert_allclose(small.numpy(), factor * whole.numpy(), rtol=1e-6)


@paddle.no_grad()
def test_twenty_couplings_of_the_papers_start_stay_small():
    """Of features that are alike over the picture; with gain 1 their numbers grow to hundreds."""
    x = noise(1, 768, 1, 1).expand([1, 768, 6, 6])
    largest = {}
    for gain in (0.4, 1):
        paddle.seed(0)
        config = load_config("configs/paper/deit.yaml", [f"subnet_gain={gain}"])
        largest[gain] = Flow(768, config, np.random.default_rng(0))(x)[0].abs().max().item()
    assert largest[0.4] < 20 < 200 < largest[1]


# ---- loss and scores


def test_the_loss_is_its_formula():
    random = np.random.default_rng(0)
    latents = [(random.standard_normal((3, c, s, s)), random.standard_normal(3)) for c, s in ((4, 8), (6, 3))]
    expected = 0.0
    for z, log_det in latents:
        per_picture = [(0.5 * (z[b] ** 2).sum() - log_det[b]) / z[b].size for b in range(len(z))]
        expected += sum(per_picture) / len(z)
    tensors = [(paddle.to_tensor(z, "float32"), paddle.to_tensor(d, "float32")) for z, d in latents]
    loss = negative_log_likelihood(tensors)
    assert loss.shape == []
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_many_numbers_is_exact_and_its_gradients_are_those_of_a_mean():
    shapes = (8, 64, 64, 64), (3, 6, 33, 47)
    latents = [(noise(*shape), noise(shape[0])) for shape in shapes]
    expected, means = 0.0, 0.0
    for z, log_det in latents:
        z.stop_gradient = False
        dimensions = np.prod(z.shape[1:])
        expected += 0.5 * np.square(z.numpy().astype(np.float64)).mean() - log_det.numpy().mean() / dimensions
        means = means + 0.5 * paddle.square(z).mean()
    loss = negative_log_likelihood(latents)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    actual = paddle.grad(loss, [z for z, _ in latents])
    for ours, theirs in zip(actual, paddle.grad(means, [z for z, _ in latents]), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_the_location_score_is_its_formula():
    z = noise(2, 5, 3, 4)
    expected = 1 - np.exp(-0.5 * (z.numpy() ** 2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(per_location_score(z).numpy(), expected, rtol=1e-5)
    assert per_location_score(z).shape == [2, 1, 3, 4]


def test_the_location_score_runs_from_0_to_1():
    assert (per_location_score(paddle.zeros([1, 3, 2, 2])).numpy() == 0).all()
    far = per_location_score(paddle.full([1, 3, 2, 2], 1e4)).numpy()
    assert np.isfinite(far).all()
    assert (far <= 1).all()
    assert (far > 0.999).all()


def small_model(input_size):
    """A published model with perturbed flows, in eval mode."""
    model = FastFlow(load_config(PATH, [f"input_size={input_size}"]))
    perturbed(model.nf_flows)
    for i, norm in enumerate(model.norms):
        norm._variance.set_value(paddle.full_like(norm._variance, 1e4))  # small z: no saturated scores
        norm._mean.set_value(paddle.full_like(norm._mean, float(i)))
    model.eval()
    return model


@paddle.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (75, 40)])
def test_scores_are_the_mean_of_the_resized_maps(height, width):
    model, images = small_model([height, width]), noise(2, 3, height, width)
    features = model.feature_extractor(images)
    sizes = [(-(-height // scale), -(-width // scale)) for scale in (4, 8, 16)]
    assert [tuple(f.shape) for f in features] == [(2, c, *size) for c, size in zip((64, 128, 256), sizes, strict=True)]
    anomaly_map, smoothed, scores = model(images)
    assert anomaly_map.shape == smoothed.shape == [2, 1, height, width]
    assert scores.shape == [2]
    maps = [
        nn.functional.interpolate(per_location_score(z), size=[height, width], mode="bilinear", align_corners=True)
        for z, _ in model.latents(features)
    ]
    np.testing.assert_allclose(anomaly_map.numpy(), sum(maps).numpy() / 3, atol=1e-5)
    np.testing.assert_array_equal(scores.numpy(), anomaly_map.numpy().max(axis=(1, 2, 3)))  # of the raw map
    assert (anomaly_map.numpy() >= 0).all()
    assert (anomaly_map.numpy() <= 1).all()
    assert smoothed.numpy().std() < anomaly_map.numpy().std()
    for raw, smooth in zip(anomaly_map.numpy()[:, 0], smoothed.numpy()[:, 0], strict=True):
        np.testing.assert_allclose(smooth, ndimage.gaussian_filter(raw.astype(np.float64), 6), atol=1e-5)


@pytest.mark.parametrize("pixels", [1, 2, 61, 6144])
def test_the_image_score_is_the_mean_of_the_largest_values_of_each_map(pixels):
    maps = np.random.default_rng(0).random((3, 1, 64, 96), np.float32)
    expected = np.sort(maps.reshape(3, -1).astype(np.float64))[:, -pixels:].mean(axis=1)
    scores = image_score(paddle.to_tensor(maps), pixels)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)
    assert scores.shape == [3]


def test_a_larger_map_around_it_dilutes_no_defect_and_no_score_is_above_1():
    small = np.zeros((1, 1, 64, 96), np.float32)
    small[..., 20:30, 40:50] = 0.75
    large = np.pad(small, ((0, 0), (0, 0), (100, 200), (300, 0)))
    scores = [image_score(paddle.to_tensor(array), 150).item() for array in (small, large)]
    assert scores == [0.5, 0.5]  # 100 of 150
    for pixels in range(2, 200, 7):
        assert image_score(paddle.ones([1, 1, 64, 96]), pixels).item() == 1


@paddle.no_grad()
def test_a_model_scores_pictures_as_its_config_says():
    images = noise(2, 3, 64, 96)
    model = FastFlow(load_config(PATH, ["input_size=[64,96]", "image_score=top", "top_share=0.01"]))
    model.eval()
    anomaly_map, _, scores = model(images)
    np.testing.assert_array_equal(scores.numpy(), image_score(anomaly_map, 61).numpy())


@paddle.no_grad()
def test_a_picture_scores_the_same_alone_and_in_a_batch():
    model, images = small_model(64), noise(3, 3, 64, 64)
    together = model(images)[0].numpy()
    alone = np.concatenate([model(images[i : i + 1])[0].numpy() for i in range(3)])
    np.testing.assert_allclose(alone, together, atol=1e-5)


@paddle.no_grad()
def test_without_norms_the_flows_take_the_features_as_they_are():
    model = FastFlow(load_config(PATH, ["input_size=64", "use_norm=False"]))
    assert not any(name.startswith("norms") for name in model.state_dict())
    features = [noise(1, c, s, s) for c, s in ((64, 16), (128, 8), (256, 4))]
    for i, (z, log_det) in enumerate(model.latents(features)):
        expected_z, expected_log_det = model.nf_flows[i](features[i])
        np.testing.assert_array_equal(z.numpy(), expected_z.numpy())
        np.testing.assert_array_equal(log_det.numpy(), expected_log_det.numpy())


@pytest.mark.parametrize(("height", "width"), [(33, 33), (100, 72), (32, 201)])
def test_sizes_that_no_stride_divides_work(height, width):
    model = FastFlow(load_config(PATH, [f"input_size=[{height}, {width}]"]))
    model.eval()
    with paddle.no_grad():
        assert model(noise(1, 3, height, width))[0].shape == [1, 1, height, width]


# ---- what is trained and what is not


def test_with_a_subnet_for_each_coupling_it_trains_what_the_published_code_reports(config):
    assert FastFlow(dataclasses.replace(config, share_subnet=False)).trainable_parameters() == 4_896_728


def test_the_published_model_trains_2450604_numbers(config):
    assert FastFlow(config).trainable_parameters() == 2_450_604


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU draws other numbers")
def test_a_seed_gives_the_start_that_it_has_always_given(config):
    """So that a published training can be had again; the backbone's own draws come before those of the flows."""
    paddle.seed(config.seed)
    flows = FastFlow(config).nf_flows
    first, last = flows[0].module_list[0].subnet[0].weight, flows[2].module_list[-1].subnet[2].weight
    np.testing.assert_allclose(first[0, 0, 0], [-0.05676457, 0.15939362, 0.11815874], rtol=1e-6)
    np.testing.assert_allclose(last[-1, -1, -1], [-0.0405443, -0.00412387, -0.00493379], rtol=1e-6)


def test_a_blank_model_draws_nothing_and_leaves_no_trace(config):
    def drawn_next():
        return nn.Linear(3, 3).weight.numpy()

    paddle.seed(1)
    expected = drawn_next()
    paddle.seed(1)
    blank = FastFlow.blank(config)
    np.testing.assert_array_equal(drawn_next(), expected)
    shapes = {name: value.shape for name, value in FastFlow(config).state_dict().items()}
    assert {name: value.shape for name, value in blank.state_dict().items()} == shapes
    with pytest.raises(UserError):
        FastFlow.blank(dataclasses.replace(config, hidden_ratio=0.001))
    paddle.seed(1)
    np.testing.assert_array_equal(drawn_next(), expected)


def test_training_changes_every_parameter_but_the_backbone():
    config = load_config(PATH, ["input_size=64"])
    paddle.seed(0)
    model = FastFlow(config)
    model.eval()
    images = noise(4, 3, 64, 64)
    features = model.feature_extractor(images)
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    model.train()
    optimizer = build_optimizer(model, config)
    losses = [training_step(model, optimizer, model.feature_extractor(images)).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for name, value in model.state_dict().items():
        frozen = name.startswith("feature_extractor.")
        assert np.array_equal(value.numpy(), before[name]) == frozen, name
    for old, new in zip(features, model.feature_extractor(images), strict=True):
        np.testing.assert_array_equal(new.numpy(), old.numpy())


def test_the_backbone_stays_in_eval_mode_and_gets_no_gradient(config):
    model = FastFlow(config)
    model.train()
    assert model.norms[0].training
    assert not any(layer.training for layer in model.feature_extractor.sublayers(include_self=True))
    assert all(p.stop_gradient for p in model.feature_extractor.parameters())


def test_running_statistics_keep_95_percent_of_what_they_were():
    model = FastFlow(load_config(PATH, ["input_size=64"]))
    model.train()
    features = [noise(2, c, s, s) + 3.0 for c, s in ((64, 16), (128, 8), (256, 4))]
    model.latents(features)
    mean, variance = features[0].numpy().mean(axis=(0, 2, 3)), features[0].numpy().var(axis=(0, 2, 3))
    np.testing.assert_allclose(model.norms[0]._mean.numpy(), 0.05 * mean, rtol=1e-4)
    np.testing.assert_allclose(model.norms[0]._variance.numpy(), 0.95 + 0.05 * variance, rtol=1e-4)
