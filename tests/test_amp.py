"""Mixed precision: where it computes in bfloat16 or float16, what stays float32, and the scaling of the loss."""

import dataclasses
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import train
from deploy.common.cli import UserError
from models.cpu import convolutions
from models.cpu import flow as cpu_flow
from models.fastflow import FastFlow, Subnet, negative_log_likelihood
from tests.test_onednn import both, gradients, make_flow, random, refuse, tensor  # noqa: F401  (a fixture)
from utils import distributed, loss_scale, training
from utils.checkpoint import load_checkpoint
from utils.loss_scale import LossScale
from utils.training import Training, build_optimizer, mixed_precision, training_step

ROOT = Path(__file__).resolve().parent.parent

REASON = convolutions.bfloat16_unavailable()
needs_bfloat16 = pytest.mark.skipif(REASON is not None, reason=f"no bfloat16: {REASON}")


@pytest.fixture
def small(config):
    return dataclasses.replace(config, input_size=64, flow_step=2, pretrained="offline")


def start(config, dtype="float32"):
    """A model in training mode, its optimizer, and features of a batch; always the same ones."""
    paddle.seed(0)
    model = FastFlow(config)
    model.train_in(dtype)
    model.train()
    images = np.random.RandomState(0).rand(4, 3, 64, 64).astype(np.float32)
    return model, build_optimizer(model, config), model.feature_extractor(paddle.to_tensor(images))


def losses(config, dtype, steps=4):
    model, optimizer, features = start(config, dtype)
    return [training_step(model, optimizer, features).item() for _ in range(steps)]


def parameters(model):
    return {name: p.numpy() for name, p in model.named_parameters() if not p.stop_gradient}


# ---- on the CPU


class Rounded(paddle.autograd.PyLayer):
    """The values, or their gradients, with bfloat16's 8 bits."""

    @staticmethod
    def forward(ctx, x, values):
        ctx.values = values
        return x.astype("bfloat16").astype("float32") if values else 1 * x

    @staticmethod
    def backward(ctx, g):
        return g if ctx.values else g.astype("bfloat16").astype("float32")


def rounding_subnet(subnet, x):
    """What bfloat16 does to a subnet, in float32: its inputs, weights and inner values are rounded."""
    conv1, _, conv2 = subnet

    def convolve(x, weight, bias):
        y = F.conv2d(Rounded.apply(x, True), Rounded.apply(weight, True), bias, padding=weight.shape[-1] // 2)
        return Rounded.apply(y, False)

    hidden = F.relu(convolve(x, conv1.weight, conv1.bias))
    return 10 * convolve(hidden, 0.1 * conv2.weight, 0.1 * conv2.bias)


@needs_bfloat16
@pytest.mark.parametrize(
    "changes", [{}, {"channels": 64}, {"channels": 20}, {"conv3x3_only": False}, {"share_subnet": False}]
)
def test_bfloat16_rounds_what_goes_into_convolutions_and_nothing_else(config, random, monkeypatch, changes):  # noqa: F811
    flow = make_flow(config, random, **changes)
    x = tensor(random, 5, flow.module_list[0].global_scale.shape[1], 6, 10)
    monkeypatch.setattr(cpu_flow, "CHUNK", 2 * x[0].size)
    with monkeypatch.context() as patch:
        patch.setattr(Subnet, "forward", rounding_subnet)
        expected = gradients(flow._plain, flow, x, both)
    monkeypatch.setattr(flow, "_plain", refuse)
    for step in flow.module_list:
        step.subnet.training_dtype = "bfloat16"
    actual = gradients(flow, flow, x, both)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # z and log-det, then gradients, in which a sum of two is rounded once more
        assert np.linalg.norm(a - e) <= (2e-4 if i < 2 else 1e-2) * np.linalg.norm(e)


@needs_bfloat16
def test_bfloat16_training_follows_float32(small):
    exact, mixed = losses(small, "float32"), losses(small, "bfloat16")
    np.testing.assert_allclose(mixed, exact, rtol=1e-2)
    assert mixed != exact


@needs_bfloat16
def test_eval_mode_is_float32(small):
    scores = []
    for dtype in ("float32", "bfloat16"):
        model, _, features = start(small, dtype)
        model.eval()
        scores.append(model.score(features)[0].numpy())
    np.testing.assert_array_equal(*scores)


# ---- on a GPU, as far as a CPU can tell: there Paddle's own mixed precision does nothing


@pytest.fixture
def auto_cast(monkeypatch):
    """In place of Paddle's: what a sequence of layers returns has the dtype. Gives the dtypes asked for."""
    asked = []

    @contextmanager
    def fake(dtype):
        asked.append(dtype)
        forward = nn.Sequential.forward
        with monkeypatch.context() as patch:
            patch.setattr(nn.Sequential, "forward", lambda self, x: forward(self, x).astype(dtype))
            yield

    monkeypatch.setattr(paddle.amp, "auto_cast", fake)
    monkeypatch.setattr(cpu_flow, "unavailable", lambda: "a test")
    return asked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_subnets_are_cast(small, auto_cast, dtype):
    exact = losses(small, "float32")
    assert not auto_cast
    mixed = losses(small, dtype)
    assert set(auto_cast) == {dtype}
    np.testing.assert_allclose(mixed, exact, rtol=1e-2)
    assert mixed != exact
    model, _, features = start(small, dtype)
    latents = model.latents(features)
    loss = negative_log_likelihood(latents)
    loss.backward()
    tensors = [loss, *itertools.chain(*latents), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert {t.dtype for t in tensors} == {paddle.float32}
    auto_cast.clear()
    model.eval()
    model.latents(features)
    assert not auto_cast


# ---- loss scaling


def test_a_scale_of_the_loss_changes_no_step(small):
    results = []
    for scale in (None, LossScale()):
        model, optimizer, features = start(small)
        loss = training_step(model, optimizer, features, scale=scale).item()
        results.append([loss, *parameters(model).values()])
    for plain, scaled in zip(*results, strict=True):
        np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-6)


def infinite(tensors):
    """An exchange after which a gradient is infinite in every process."""
    tensors[-1].set_value(paddle.full_like(tensors[-1], np.inf))


def test_an_infinite_gradient_of_any_process_changes_nothing_but_the_scale(small, monkeypatch):
    model, optimizer, features = start(small)
    scale, before = LossScale(), parameters(model)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "sum_over_processes", infinite)
        training_step(model, optimizer, features, scale=scale)
    assert scale.state() == {"scale": 2.0**15, "good_steps": 0}
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(value, before[name])
    training_step(model, optimizer, features, scale=scale)
    assert scale.state() == {"scale": 2.0**15, "good_steps": 1}
    after = parameters(model)
    assert all((after[name] != before[name]).any() for name in after if name.endswith("offset"))
    assert all(np.isfinite(value).all() for value in after.values())


@pytest.mark.slow
def test_skipped_steps_are_logged_and_leave_the_scale_at_1(small, monkeypatch):
    class Features:
        def __len__(self):
            return 20

        def draw(self, _):
            pass

        def kept(self, _):
            return []

        def batch(self, _):
            return features

    model, _, features = start(small)
    in_training, lines = Training(model, dataclasses.replace(small, batch_size=1)), []
    in_training.scale = LossScale()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "sum_over_processes", infinite)
        loss = in_training.epoch(Features(), lines.append)
    assert in_training.scale.state()["scale"] == 1
    assert lines[-1].startswith("Epoch 1 - 20 of 20 steps skipped")
    in_training.record(loss, None, None, None, 1.0)
    in_training.epoch(Features(), lines.append)
    assert "skipped" not in lines[-1]


@pytest.mark.slow
def test_the_scale_rises_and_is_resumed_from_the_checkpoint(auto_cast, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "mixed_precision", lambda: ("float16", "float16"))
    monkeypatch.setattr(loss_scale, "RISE_AFTER", 3)
    monkeypatch.setattr(train, "hold_folder", lambda folder: None)  # which a process does once
    monkeypatch.chdir(tmp_path)
    options = f"train.py -cfg {ROOT}/configs/resnet18.yaml --data {ROOT}/lite_data -cat bottle --amp --batch_size 12"
    options = [*options.split(), *"-o input_size=64 -o flow_step=1 -o pretrained=offline --exp_dir exp".split()]
    folder = tmp_path / "results/exp/bottle"
    checkpoints = []
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        monkeypatch.setattr(sys, "argv", [*options, *more])
        with paddle.utils.unique_name.guard():  # as in a process of its own
            train.main()
        checkpoints.append(load_checkpoint(folder / "last.pdparams"))
    expected = [{"scale": 2.0**16, "good_steps": 2}, {"scale": 2.0**17, "good_steps": 1}]
    assert [checkpoint["loss_scale"] for checkpoint in checkpoints] == expected
    assert all(checkpoint["config"]["amp"] for checkpoint in checkpoints)
    assert "mixed precision: the flows' convolutions compute in float16" in (folder / "train.log").read_text()


@pytest.mark.parametrize("state", [None, {}, {"scale": "x", "good_steps": 0}, {"scale": float("nan"), "good_steps": 0}])
def test_a_damaged_scale_is_refused(state):
    with pytest.raises(UserError, match=r"last\.pdparams: its loss scale"):
        LossScale().resume(state, "last.pdparams")


# ---- which of them


@pytest.mark.parametrize(
    ("bfloat16", "float16", "dtype", "said"),
    [
        (True, True, "bfloat16", "bfloat16"),
        (False, True, "float16", "loss scaling"),
        (False, False, "float32", "neither"),
    ],
)
def test_a_gpu_takes_what_it_has(monkeypatch, bfloat16, float16, dtype, said):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda: bfloat16)
    monkeypatch.setattr(paddle.amp, "is_float16_supported", lambda: float16)
    chosen, line = mixed_precision()
    assert chosen == dtype
    assert said in line


@pytest.mark.parametrize(
    ("flags", "onednn_", "dtype", "said"),
    [
        ({"avx512f", "avx512_bf16"}, None, "bfloat16", "bfloat16"),
        ({"avx512f"}, None, "float32", "no avx512_bf16"),
        ({"avx512_bf16"}, "FASTFLOW_ONEDNN=0", "float32", "FASTFLOW_ONEDNN=0"),
    ],
)
def test_a_cpu_takes_what_is_faster(monkeypatch, flags, onednn_, dtype, said):
    monkeypatch.setattr(convolutions.runtime, "cpu_flags", lambda: flags)
    monkeypatch.setattr(convolutions, "unavailable", lambda: onednn_)
    monkeypatch.setattr(convolutions, "bfloat16_unavailable", convolutions.bfloat16_unavailable.__wrapped__)
    chosen, line = mixed_precision()
    assert chosen == dtype
    assert said in line
