"""The published modules' own numbers, when FASTFLOW_REFERENCE_DIR points at them."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import paddle
import pytest

from models.fastflow import FastFlow, negative_log_likelihood
from utils.checkpoint import published_state, set_published_state
from utils.training import build_optimizer, training_step

FOLDER = os.environ.get("FASTFLOW_REFERENCE_DIR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="FASTFLOW_REFERENCE_DIR is not set")


@pytest.fixture(scope="module")
def golden():
    return json.loads((Path(FOLDER) / "golden.json").read_text())


@pytest.fixture
def model(config):
    """Parameters drawn by the rule in the reference's README, under the published names."""
    layout = json.loads((Path(FOLDER) / "checkpoint_layout.json").read_text())
    random = np.random.RandomState(20221122)
    state = {}
    for name in sorted(layout):
        shape = layout[name]
        if name.endswith("w_perm"):
            kernel = np.eye(shape[0], dtype=np.float32)[random.permutation(shape[0])]
            state[name] = kernel.reshape(shape)
            state[name + "_inv"] = kernel.T.reshape(shape)
        elif not name.endswith("w_perm_inv"):
            state[name] = draw(name, random.standard_normal(shape).astype(np.float32))
    assert state.keys() == layout.keys()
    model = FastFlow(config)
    set_published_state(model, state, "golden")
    return model


def draw(name, z):
    is_norm = name.startswith("norms") or ".bn" in name or "downsample.1" in name
    if name.endswith("_variance"):
        return (100 if name.startswith("norms") else 1) * (1 + 0.1 * np.abs(z))
    if name.endswith("_mean") or name.endswith("global_offset"):
        return 0.1 * z
    if name.endswith("global_scale") or (name.endswith("weight") and is_norm):
        return 1 + 0.1 * z
    if name.endswith("bias"):
        return 0.05 * z
    gain = 1 if name.startswith("nf_flows") else 2
    return z * np.sqrt(gain / np.prod(z.shape[1:]))


def test_evaluation(model, golden):
    model.eval()
    images = np.random.RandomState(7).rand(2, 3, 256, 256).astype(np.float32) * 4 - 2
    with paddle.no_grad():
        features = model.feature_extractor(paddle.to_tensor(images))
        latents = model.latents(features)
        loss = negative_log_likelihood(latents)
        anomaly_map, smoothed, scores = model.score(features)

    def close(actual, expected):
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-4)

    close([x.mean().item() for x in features], golden["feature_mean"])
    close([x.std().item() for x in features], golden["feature_std"])
    close([z.mean().item() for z, _ in latents], golden["z_mean"])
    close([z.std().item() for z, _ in latents], golden["z_std"])
    close([log_det.numpy() for _, log_det in latents], golden["log_jac_det"])
    close(loss.item(), golden["eval_loss"])
    close(scores.numpy(), golden["image_scores"])
    close(smoothed.max(axis=[1, 2, 3]).numpy(), golden["smoothed_max"])
    maps = np.load(Path(FOLDER) / "golden_maps.npz")
    close(anomaly_map.numpy(), maps["anomaly_map"])
    close(smoothed.numpy(), maps["smoothed"])


@pytest.mark.slow
def test_training(model, golden, config):
    model.train()
    optimizer = build_optimizer(model, config)
    images = np.random.RandomState(8).rand(4, 3, 256, 256).astype(np.float32) * 4 - 2
    features = model.feature_extractor(paddle.to_tensor(images))
    losses = [training_step(model, optimizer, features).item() for _ in golden["train_losses"]]
    np.testing.assert_allclose(losses, golden["train_losses"], rtol=1e-3)
    state = published_state(model)
    for name in ("mean", "var"):
        key = "norms.0._mean" if name == "mean" else "norms.0._variance"
        expected = golden[f"norm0_running_{name}_after_5_steps"]
        np.testing.assert_allclose(state[key][:8], expected, rtol=1e-4)


def test_round_trip_of_the_published_names(model, config):
    state = published_state(model)
    layout = json.loads((Path(FOLDER) / "checkpoint_layout.json").read_text())
    published = {name: shape for name, shape in layout.items() if ".subnet_2." not in name}
    assert {name: list(value.shape) for name, value in state.items()} == published
    both = published_state(FastFlow(dataclasses.replace(config, share_subnet=False)))
    assert {name: list(value.shape) for name, value in both.items()} == layout
    other = FastFlow(config)
    set_published_state(other, state, "round trip")
    for name, value in published_state(other).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
