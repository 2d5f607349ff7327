"""The oneDNN path gives the numbers of the plain one, and steps aside where it cannot."""

import ctypes.util
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.vision import models as vision

from models.backbone import BACKBONES, ResNetFeatures, build_backbone
from models.cpu import convolutions, onednn, products, winograd
from models.cpu import features as cpu_features
from models.cpu import flow as cpu_flow
from models.cpu.efficientnet import EfficientNetProgram, same_padding
from models.cpu.resnet import ResNetProgram
from models.fastflow import FastFlow, Flow
from utils.training import build_optimizer, training_step

REASON = convolutions.unavailable()
needs_onednn = pytest.mark.skipif(REASON is not None, reason=f"oneDNN is not available: {REASON}")
CONVOLUTIONAL = [name for name, entry in BACKBONES.items() if not entry.patch]
ONLY_AVX2 = REASON is None and "avx2" in onednn.Convolution((1, 8, 4, 4), (8, 8, 3, 3)).implementation


@pytest.fixture
def random():
    return np.random.RandomState(5)


@pytest.fixture
def without_onednn(monkeypatch):
    """Call it to turn the plain path on."""
    return lambda: monkeypatch.setattr(cpu_flow, "unavailable", lambda: "a test")


def refuse(_):
    raise AssertionError("the plain path was taken")


def make_flow(config, random, channels=32, **changes):
    """Hidden values stay far from the ReLU's corner, where rounding decides about a gradient."""
    flow = Flow(channels, dataclasses.replace(config, **{"flow_step": 3} | changes), np.random.default_rng(0))
    for name, parameter in flow.named_parameters():
        z = random.standard_normal(parameter.shape)
        if name.endswith(("subnet.0.bias", "subnet_2.0.bias")):
            value = 2 * np.sign(z)
        elif name.endswith("global_scale"):
            value = 1 + 0.1 * z
        elif name.endswith("weight"):
            gain = 0.2 if name.endswith(".0.weight") else 3
            value = gain * z / np.sqrt(np.prod(parameter.shape[1:]))
        else:
            value = 0.5 * z
        parameter.set_value(value.astype(np.float32))
    return flow


def tensor(random, *shape):
    return paddle.to_tensor(random.standard_normal(shape).astype(np.float32))


def gradients(forward, flow, x, loss):
    """z, log-det, and the gradients of x and of the parameters; zeros where there is none."""
    leaf = x.detach()
    leaf.stop_gradient = False
    z, log_det = forward(1 * leaf)
    loss(z, log_det).backward()
    tensors = [leaf, *flow.parameters()]
    result = [z.numpy(), log_det.numpy()]
    result += [np.zeros(t.shape, np.float32) if t.grad is None else t.grad.numpy() for t in tensors]
    flow.clear_gradients()
    return result


def assert_agree(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - e) <= 3e-4 * np.linalg.norm(e) + 1e-12
    actual, expected = (np.concatenate([a.ravel() for a in arrays[2:]]) for arrays in (actual, expected))
    assert np.linalg.norm(actual - expected) <= 5e-5 * np.linalg.norm(expected)


def both(z, log_det):
    weights = paddle.arange(1, len(log_det) + 1, dtype="float32")  # each image's gradient is another
    return (paddle.sin(z).sum(axis=[1, 2, 3]) * weights).sum() - (log_det * weights).sum()


@needs_onednn
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": 64},  # hidden width 33
        {"channels": 128, "hidden_ratio": 1.06},  # 67
        {"channels": 20, "hidden_ratio": 0.16},  # 1
        {"conv3x3_only": False},
        {"share_subnet": False},
        {"clamp": 1.2},
    ],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_flow_agrees(config, random, monkeypatch, changes, batch):
    flow = make_flow(config, random, **changes)
    x = tensor(random, batch, flow.module_list[0].global_scale.shape[1], 6, 10)
    monkeypatch.setattr(cpu_flow, "CHUNK", 2 * x[0].size)  # images go two at a time, the last one alone
    expected = gradients(flow._plain, flow, x, both)
    monkeypatch.setattr(flow, "_plain", refuse)
    assert_agree(gradients(flow, flow, x, both), expected)
    with paddle.no_grad():
        z, log_det = flow(x)
    np.testing.assert_allclose(z.numpy(), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det.numpy(), expected[1], rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize("loss", [lambda z, _: paddle.sin(z).sum(), lambda _, log_det: log_det.sum()])
def test_one_output_without_gradient(config, random, loss):
    flow = make_flow(config, random)
    x = tensor(random, 2, 32, 6, 6)
    assert_agree(gradients(flow, flow, x, loss), gradients(flow._plain, flow, x, loss))


@needs_onednn
def test_inputs_that_need_no_gradient(config, random):
    flow = make_flow(config, random)
    x = tensor(random, 2, 32, 6, 6)
    trained = flow.module_list[1].subnet[2].weight
    for parameter in flow.parameters():
        parameter.stop_gradient = parameter is not trained
    both(*flow._plain(x)).backward()
    expected = trained.grad.numpy()
    flow.clear_gradients()
    both(*cpu_flow.flow(x, flow.module_list, refuse, training=True)).backward()
    np.testing.assert_allclose(trained.grad.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert all(p.grad is None for p in flow.parameters() if p is not trained)


@needs_onednn
@paddle.no_grad()
def test_input_that_is_not_contiguous(config, random):
    flow = make_flow(config, random)
    x = tensor(random, 2, 32, 6, 10).transpose([0, 1, 3, 2])
    np.testing.assert_allclose(flow(x)[0].numpy(), flow._plain(x)[0].numpy(), rtol=1e-4, atol=1e-5)


@needs_onednn
def test_gradients_in_eval_mode_can_be_asked_for_in_any_way(config, random):
    flow = make_flow(config, random, channels=8)
    flow.eval()
    z, _ = flow(tensor(random, 1, 8, 2, 2))
    weight = flow.module_list[0].subnet[0].weight
    higher = not paddle.__version__.startswith("2.")  # which has no second derivative of index_select
    for _ in range(2):
        (first,) = paddle.grad(z.sum(), [weight], retain_graph=True, create_graph=higher)
    assert first.shape == weight.shape


@needs_onednn
@pytest.mark.parametrize("steps", [1, 3])
def test_a_change_in_place_between_the_passes_is_what_it_is_to_paddle(config, random, steps):
    """Where Paddle's own operators raise there is an error; where they do not the gradients are theirs."""
    flow, images = make_flow(config, random, flow_step=steps), tensor(random, 2, 32, 6, 6)
    start = {name: p.numpy() for name, p in flow.named_parameters()}

    def outcome(forward, name):
        leaf = images.detach()
        leaf.stop_gradient = False
        tensors = {"x": 1 * leaf, **dict(flow.named_parameters())}
        for parameter, value in start.items():
            tensors[parameter].set_value(value)
        loss = both(*forward(tensors["x"]))
        with paddle.no_grad():
            tensors[name].add_(paddle.ones_like(tensors[name]))
        flow.clear_gradients()
        try:
            loss.backward()
        except (RuntimeError, OSError) as error:
            assert "has been modified by an inplace operation" in str(error)
            return None
        return [t.grad.numpy() for t in (leaf, *flow.parameters())]

    raised = set()
    for name in ("x", *start):
        expected, actual = outcome(flow._plain, name), outcome(flow, name)
        if expected is None:
            assert actual is None, name
            raised.add(name.split(".", 2)[-1])
        else:
            assert_agree(actual, expected)
    assert raised == {"global_scale", "subnet.0.weight", "subnet.2.weight"}


@needs_onednn
def test_activations_are_used_again(config, random, monkeypatch):
    made = []
    activations = cpu_flow._Activations
    monkeypatch.setattr(cpu_flow, "_Activations", lambda *shape: made.append(shape) or activations(*shape))
    flow = make_flow(config, random)
    x = {batch: tensor(random, batch, 32, 7, 5) for batch in (1, 2, 3)}
    for batch in [1, 2, 3] * 5:
        both(*flow(x[batch])).backward()
    assert len(made) <= 3 * len(flow.module_list)


@pytest.mark.slow
@needs_onednn
def test_memory_goes_with_the_flow(config, random):
    """When primitives and activations stayed, 24 sizes in a process took hundreds of megabytes more than one."""

    def resident():
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    def train(size):
        flow, x = make_flow(config, random), tensor(random, 4, 32, size, size)
        both(*flow(x)).backward()

    train(72)
    before = resident()
    for size in range(24, 72, 2):
        train(size)
    assert resident() - before < 60


@pytest.mark.slow
@needs_onednn
def test_training_gives_the_same_losses(config, random, without_onednn):
    config = dataclasses.replace(config, input_size=64, pretrained="offline")
    images = [tensor(random, batch, 3, 64, 64) for batch in (4, 4, 2)]

    def losses():
        model = FastFlow(config)
        model.set_state_dict(state)
        model.train()
        optimizer = build_optimizer(model, config)
        return [training_step(model, optimizer, model.feature_extractor(x)).item() for x in images * 2]

    paddle.seed(0)
    state = FastFlow(config).state_dict()
    actual = losses()
    without_onednn()
    np.testing.assert_allclose(actual, losses(), rtol=1e-4)


@pytest.fixture
def backbone(random):
    paddle.seed(0)
    return with_statistics(build_backbone("resnet18"), random)


def with_statistics(model, random):
    model.eval()
    for name, buffer in model.named_buffers():
        z = random.standard_normal(buffer.shape).astype(np.float32)
        buffer.set_value(1 + 0.3 * np.abs(z) if name.endswith("variance") else 0.1 * z)
    return model


def features(model, images, plain=refuse):
    program = ResNetProgram if isinstance(model, ResNetFeatures) else EfficientNetProgram
    return cpu_features.features(model, images, plain, program)


def assert_features_agree(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).norm().item() <= 1e-5 * e.norm().item()


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (5, 3, 96, 64), (2, 3, 75, 61)])
def test_backbone_agrees(backbone, random, shape):
    images = tensor(random, *shape)
    assert_features_agree(features(backbone, images), backbone._plain(images))


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONAL if name != "resnet18"])
@pytest.mark.parametrize("scales", [None, [4, 8, 16, 32]])
def test_every_backbone_agrees(random, name, scales):
    model = with_statistics(build_backbone(name, scales), random)
    images = tensor(random, 2, 3, 40, 75)
    assert_features_agree(features(model, images), model._plain(images))


@needs_onednn
def test_groups_of_channels_agree(random):
    model = with_statistics(ResNetFeatures(vision.resnext50_32x4d(), [4, 8, 16]), random)
    images = tensor(random, 2, 3, 40, 64)
    assert_features_agree(features(model, images), model._plain(images))


@needs_onednn
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 8, 9])
def test_the_padding_is_that_of_same(random, kernel, stride, size):
    x, weights, bias = tensor(random, 1, 16, size, size + 1), tensor(random, 16, 1, kernel, kernel), np.zeros(16, "f4")
    expected = paddle.nn.functional.conv2d(x, weights, stride=stride, padding="SAME", groups=16)
    padding = [same_padding(side, kernel, stride) for side in x.shape[2:]]
    form = onednn.Convolution(x.shape, (16, 1, 1, kernel, kernel), stride, padding)
    assert list(form.dst) == expected.shape
    y = onednn.Buffer.empty(*(form.dst[i] for i in (0, 2, 3, 1)))
    last = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1))
    form(onednn.Buffer(last), form.packed(weights.numpy()), onednn.Buffer(bias), y)
    np.testing.assert_allclose(y.array.transpose(0, 3, 1, 2), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_backbone_without_batch_norms_agrees(random, name):
    model = with_statistics(build_backbone(name), random)
    images = tensor(random, 2, 3, 40, 64)
    alone = cpu_features.without_batch_norms(model)
    assert any(isinstance(layer, nn.BatchNorm2D) for layer in model.sublayers())
    assert not any(isinstance(layer, nn.BatchNorm2D) for layer in alone.sublayers())
    assert_features_agree(alone._plain(images), model._plain(images))


def test_folding_keeps_biases_and_other_norms(backbone, random):
    backbone.conv1.bias = backbone.conv1.create_parameter([64], is_bias=True)
    backbone.conv1.bias.set_value(random.standard_normal(64).astype(np.float32))
    block = backbone.layer1[0]
    block.bn2 = nn.GroupNorm(4, 64)
    images = tensor(random, 2, 3, 40, 64)
    alone = cpu_features.without_batch_norms(backbone)
    assert isinstance(alone.layer1[0].bn2, nn.GroupNorm)
    assert_features_agree(alone._plain(images), backbone._plain(images))


@needs_onednn
def test_gradients_of_images_go_the_plain_way(backbone, random):
    images = tensor(random, 1, 3, 64, 64)
    images.stop_gradient = False
    (gradient,) = paddle.grad(backbone(images)[2].sum(), [images])
    assert gradient.abs().max().item() > 0
    with paddle.no_grad():
        assert_features_agree(features(backbone, images), backbone._plain(images))


@needs_onednn
def test_new_weights_of_the_backbone_are_noticed(backbone, random):
    images = tensor(random, 1, 3, 64, 64)
    before = backbone(images)
    other = with_statistics(build_backbone("resnet18"), random)
    backbone.set_state_dict(other.state_dict())
    assert_features_agree(backbone(images), other._plain(images))
    assert (backbone(images)[0] - before[0]).abs().max().item() > 0.01
    backbone.layer1[0].bn1.weight.set_value(2 * backbone.layer1[0].bn1.weight)
    assert_features_agree(backbone(images), backbone._plain(images))


def one_bit(weight):
    weight.view(np.uint32)[-1, -1, -1, -1] ^= 1
    return weight


@needs_onednn
@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv2.weight", "layer3.1.conv1.weight"])
@pytest.mark.parametrize(
    "change", [lambda w: w[:, ::-1], lambda w: np.roll(w, 1, axis=0), lambda w: w[:, :, ::-1, ::-1], one_bit]
)
def test_weights_that_change_places_are_noticed(backbone, name, change):
    before, parameter = cpu_features._checksum(backbone), dict(backbone.named_parameters())[name]
    assert cpu_features._checksum(backbone) == before
    parameter.set_value(np.ascontiguousarray(change(parameter.numpy())))
    assert cpu_features._checksum(backbone) != before


@needs_onednn
def test_red_and_blue_exchanged_in_the_weights(backbone, random):
    images = tensor(random, 1, 3, 64, 64)
    before = backbone(images)
    backbone.conv1.weight.set_value(backbone.conv1.weight.numpy()[:, ::-1].copy())
    assert_features_agree(backbone(images), backbone._plain(images))
    assert (backbone(images)[0] - before[0]).abs().max().item() > 0.01


@needs_onednn
def test_networks_it_does_not_know_go_the_plain_way(random):
    model = with_statistics(build_backbone("resnet18"), random)
    model.layer1[0].conv1._dilation = [2, 2]
    assert features(model, tensor(random, 1, 3, 64, 64), lambda _: "plain") == "plain"


@needs_onednn
@pytest.mark.parametrize(
    "form", [onednn.WeightsGradient, products.WeightsGradientByProducts, winograd.WinogradWeightsGradient]
)
@pytest.mark.parametrize(
    ("src", "weights"),
    [
        ((2, 16, 9, 7), (33, 16, 3, 3)),
        ((3, 33, 6, 8), (16, 33, 3, 3)),
        ((2, 33, 5, 5), (7, 33, 1, 1)),
        ((2, 16, 8, 7), (33, 16, 3, 3)),
        ((3, 33, 4, 8), (16, 33, 3, 3)),
    ],
)
def test_every_form_of_the_weights_gradient_is_paddles(random, form, src, weights):
    if form is winograd.WinogradWeightsGradient and not (ONLY_AVX2 and convolutions._by_rows(src, weights)):
        pytest.skip("not for this height, kernel or CPU")
    b, _, h, w = src
    o, _, kernel, _ = weights
    x, parameter, bias, g = (tensor(random, *shape) for shape in (src, weights, [o], (b, o, h, w)))
    parameter.stop_gradient = bias.stop_gradient = False
    y = paddle.nn.functional.conv2d(x, parameter, bias, padding=kernel // 2)
    expected = paddle.grad(y, [parameter, bias], g)

    last, last_g = (onednn.Buffer(np.ascontiguousarray(t.numpy().transpose(0, 2, 3, 1))) for t in (x, g))
    gradient = form(src, weights)
    for _ in range(2):  # a second call finds what the first one left
        weights_out, bias_out = onednn.Buffer.empty(gradient.size), onednn.Buffer.empty(o)
        gradient(last, last_g, weights_out, bias_out)
        for actual, other in zip((gradient.unpacked(weights_out.array), bias_out.array), expected, strict=True):
            np.testing.assert_allclose(actual, other.numpy(), rtol=0, atol=1e-5 * np.abs(other.numpy()).max())


@pytest.mark.skipif(not ONLY_AVX2, reason="Winograd's form is not in use on this CPU")
@pytest.mark.parametrize("src", [(2, 5, 12, 7), (1, 16, 4, 4), (3, 8, 8, 3)])
def test_winograds_convolution_is_the_librarys(random, src):
    b, i, h, w = src
    o = 6
    values = {c: random.standard_normal((b, h, w, c)).astype(np.float32) for c in (i, o)}
    weights, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((o, i, 3, 3), o))

    def results(form):
        """With and without post-ops, and what brings a gradient back."""
        post_ops = onednn.PostOps().sum().eltwise(onednn.RELU)
        plain, added = form(src, weights.shape), form(src, weights.shape, post_ops=post_ops)
        adjoint = form((b, o, h, w), (i, o, 3, 3))
        assert plain.dst == (b, o, h, w)
        taken, dst = onednn.Buffer(values[i].copy()), [onednn.Buffer(values[o].copy()) for _ in range(2)]
        back = onednn.Buffer.empty(b, h, w, i)
        for _ in range(2):  # a second call finds what the first one left
            plain(taken, plain.packed(weights), onednn.Buffer(bias), dst[0])
        added(taken, added.packed(weights), onednn.Buffer(bias), dst[1])
        adjoint(onednn.Buffer(values[o]), adjoint.packed_adjoint(weights), onednn.Buffer(np.zeros(i, np.float32)), back)
        return [buffer.array for buffer in (*dst, back)]

    for actual, expected in zip(results(winograd.WinogradConvolution), results(onednn.Convolution), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_onednn
def test_without_avx2_only_the_library_convolves():
    """And with it other forms are taken where they can be had."""
    shapes = {"published": ((2, 64, 32, 32), (67, 64, 3, 3)), "odd height": ((2, 64, 30, 32), (67, 64, 3, 3))}
    shapes["1x1"] = ((2, 64, 32, 32), (67, 64, 1, 1))
    forms = {name: type(convolutions.convolution(*shape)) for name, shape in shapes.items()}
    gradients = {name: type(convolutions.weights_gradient(*shape)) for name, shape in shapes.items()}
    expected = dict.fromkeys(shapes, onednn.Convolution), dict.fromkeys(shapes, onednn.WeightsGradient)
    if ONLY_AVX2:
        expected[0]["published"] = winograd.WinogradConvolution
        expected[1]["published"] = winograd.WinogradWeightsGradient
        expected[1]["odd height"] = products.WeightsGradientByProducts
    assert (forms, gradients) == expected


def test_without_onednn_nothing_but_the_path_changes(config, random, backbone, without_onednn):
    without_onednn()
    flow, x, images = make_flow(config, random), tensor(random, 2, 32, 6, 6), tensor(random, 1, 3, 64, 64)
    assert (flow(x)[0] == flow._plain(x)[0]).all()
    assert (backbone(images)[2] == backbone._plain(images)[2]).all()


def test_a_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(onednn.Unavailable, match=r"libdnnl\.so\.3"):
        onednn.library.__wrapped__()


def test_another_library_and_another_version(monkeypatch):
    with pytest.raises(onednn.Unavailable, match="dnnl_version"):
        onednn.Library(Path(ctypes.util.find_library("c")))

    class Old:
        def dnnl_version():
            return ctypes.pointer(onednn._Version(2, 7, 1))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Old)
    with pytest.raises(onednn.Unavailable, match=r"2\.7\.1"):
        onednn.Library(Path("libdnnl.so.3"))


@needs_onednn
@pytest.mark.parametrize(
    "name",
    [
        "dnnl_memory_create",
        "dnnl_primitive_desc_query",
        "dnnl_primitive_attr_set_post_ops",
        "dnnl_post_ops_append_sum",
        "dnnl_post_ops_append_eltwise",
        "dnnl_post_ops_append_binary",
    ],
)
def test_what_cannot_be_made_goes_the_plain_way(monkeypatch, config, random, name):
    flow, x = make_flow(config, random), tensor(random, 2, 32, 6, 6)
    monkeypatch.setattr(onednn.library(), name, lambda *_: 3)
    assert (flow(x)[0] == flow._plain(x)[0]).all()


@needs_onednn
@pytest.mark.parametrize("name", ["dnnl_memory_set_data_handle", "dnnl_primitive_execute"])
def test_a_call_that_fails_is_an_error(monkeypatch, config, random, name):
    flow, x = make_flow(config, random), tensor(random, 2, 32, 6, 6)
    monkeypatch.setattr(onednn.library(), name, lambda *_: 3)
    with pytest.raises(RuntimeError, match="status 3"):
        flow(x)


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_other_platforms(monkeypatch, system, machine):
    monkeypatch.setattr(onednn.platform, "system", lambda: system)
    monkeypatch.setattr(onednn.platform, "machine", lambda: machine)
    with pytest.raises(onednn.Unavailable, match=machine):
        onednn.library.__wrapped__()


@needs_onednn
def test_the_self_check_notices_another_result(monkeypatch):
    monkeypatch.setattr(onednn, "LOGISTIC", onednn.RELU)
    with pytest.raises(onednn.Unavailable, match="something else"):
        convolutions.self_check()


FROM_THREADS = """
import threading
from deploy.common import runtime
runtime.import_paddle()
from models.cpu import convolutions
found = []
check = convolutions.unavailable.__wrapped__
threads = [threading.Thread(target=lambda: found.extend(check() for _ in range(15))) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(set(found), len(found))
"""


@pytest.mark.slow
@needs_onednn
def test_threads_that_ask_at_once():
    """What they compare has memory in common; without a lock the process crashed."""
    root = Path(__file__).resolve().parent.parent
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FROM_THREADS]
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=100)
    assert done.stdout == "{None} 45\n", done.stderr


def test_the_switch(monkeypatch):
    monkeypatch.setenv("FASTFLOW_ONEDNN", "0")
    assert convolutions.unavailable.__wrapped__() == "FASTFLOW_ONEDNN=0"
    monkeypatch.setattr(convolutions, "unavailable", lambda: "FASTFLOW_ONEDNN=0")
    assert "FASTFLOW_ONEDNN=0" in convolutions.describe()
    assert "\n" not in convolutions.describe()
