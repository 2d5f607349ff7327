"""Every backbone of the registry, and one that is added to it."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import named_by
from paddle import nn
from paddle.vision import models as vision

from deploy import export_model
from deploy.backends import load_exported
from deploy.common.cli import UserError
from deploy.description import read_description
from models import backbone as registry
from models.backbone import BACKBONES, Backbone, build_backbone, feature_shapes
from models.fastflow import FastFlow
from models.offline_start import calibrated_start
from utils.checkpoint import load_model, published_state, save_checkpoint
from utils.config import load_config
from utils.training import build_optimizer, training_step
from utils.weights import load_backbone, read_weights

ROOT = Path(__file__).resolve().parent.parent
SIZE = (64, 96)
OVERRIDES = ["input_size=[64, 96]", "flow_step=2", "pretrained=offline"]
CHANNELS = {
    "resnet18": (64, 128, 256),
    "resnet34": (64, 128, 256),
    "resnet50": (256, 512, 1024),
    "wide_resnet50_2": (256, 512, 1024),
    "efficientnet_lite0": (40, 112, 320),
}
SCALES = {name: (4, 8, 16) for name in CHANNELS} | {"efficientnet_lite0": (8, 16, 32)}
RESNETS = [name for name in CHANNELS if "resnet" in name]
VARIABLES = {name: f"FASTFLOW_WEIGHTS_{name.upper()}" for name in RESNETS} | {"resnet18": "FASTFLOW_BACKBONE_WEIGHTS"}


def noise(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, *SIZE)).astype(np.float32)


def trained_model(config):
    """A model after three training steps, its state before and after, and the losses."""
    paddle.seed(0)
    model = FastFlow(config)
    calibrated_start(model.feature_extractor, noise(4), seed=0)
    images = paddle.to_tensor(noise(4))
    for norm, x in zip(model.norms, model.feature_extractor(images), strict=True):  # no saturated scores
        norm._mean.set_value(x.mean([0, 2, 3]))
        norm._variance.set_value(x.var([0, 2, 3]))
    before = published_state(model)
    model.train()
    optimizer = build_optimizer(model, config)
    losses = [training_step(model, optimizer, model.feature_extractor(images)).item() for _ in range(3)]
    return SimpleNamespace(config=config, model=model, losses=losses, before=before, after=published_state(model))


HEAVY = pytest.param("wide_resnet50_2", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[name if name not in HEAVY.values else HEAVY for name in CHANNELS])
def trained(request):
    case = trained_model(load_config(f"configs/{request.param}.yaml", OVERRIDES))
    case.name = request.param
    return case


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """Its checkpoint, in a folder where the scripts find it."""
    path = tmp_path_factory.mktemp(trained.name) / "results/exp/part/best.pdparams"
    save_checkpoint(path, {"epoch": 1, "model_state_dict": trained.after, "config": trained.config.as_dict()})
    return path


# ---- each backbone


def test_the_registry_holds_them():
    """And Vision Transformers, of which tests/test_vit.py is."""
    assert [name for name, entry in BACKBONES.items() if not entry.patch] == list(CHANNELS)


@pytest.mark.slow
def test_channels_and_sizes_come_from_the_backbone(trained):
    sizes = [(64 // scale, 96 // scale) for scale in SCALES[trained.name]]
    expected = [(c, *size) for c, size in zip(CHANNELS[trained.name], sizes, strict=True)]
    assert feature_shapes(trained.model.feature_extractor, SIZE) == expected
    features = trained.model.feature_extractor(paddle.to_tensor(noise(2)))
    assert [tuple(x.shape) for x in features] == [(2, *shape) for shape in expected]
    assert [len(norm.weight) for norm in trained.model.norms] == list(CHANNELS[trained.name])
    assert [(tuple(a.rows.shape), tuple(a.columns.shape)) for a in trained.model.resize] == [
        ((64, h), (96, w)) for h, w in sizes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNETS)
def test_names_and_shapes_of_the_weights_are_paddles(name):
    whole = getattr(vision, name)(pretrained=False).state_dict()
    expected = {name: value.shape for name, value in whole.items() if not name.startswith(("layer4.", "fc."))}
    assert {name: value.shape for name, value in build_backbone(name).state_dict().items()} == expected


def test_training_leaves_the_backbone_as_it_was(trained):
    extractor = trained.model.feature_extractor
    trained.model.train()
    assert not any(layer.training for layer in extractor.sublayers(include_self=True))
    assert all(p.stop_gradient and p.grad is None for p in extractor.parameters())
    assert all(x.stop_gradient for x in extractor(paddle.to_tensor(noise(1))))
    assert trained.losses[2] < trained.losses[0]
    for name, value in trained.after.items():
        frozen = name.startswith("feature_extractor.") or "w_perm" in name
        assert np.array_equal(value, trained.before[name]) == frozen, name


def test_large_backbones_alternate_kernels(trained):
    kernels = [step.subnet[0].weight.shape[-1] for step in trained.model.nf_flows[0].module_list]
    assert kernels == ([3, 1] if "50" in trained.name else [3, 3])


def test_a_checkpoint_makes_the_same_model_again(trained, saved):
    model, _ = load_model(trained.config, saved)
    for name, value in published_state(model).items():
        np.testing.assert_array_equal(value, trained.after[name], err_msg=name)


def test_without_a_config_the_checkpoint_knows_its_backbone(trained, saved, config):
    model, _ = load_model(config, saved, [])
    assert (model.config.backbone_name, model.config.input_size) == (trained.name, trained.config.input_size)
    for name, value in published_state(model).items():
        np.testing.assert_array_equal(value, trained.after[name], err_msg=name)


def test_a_checkpoint_of_another_backbone_is_a_line_that_names_both(trained, saved):
    other = "resnet34" if trained.name == "resnet18" else "resnet18"
    with pytest.raises(UserError) as error:
        load_model(load_config(f"configs/{other}.yaml", OVERRIDES), saved)
    assert f"{saved}: does not fit this model" in str(error.value)
    assert f"trained with backbone_name {trained.name}, the config says {other}" in str(error.value)
    assert f"give -cfg {saved.parent / 'config.yaml'} or -o backbone_name={trained.name}" in str(error.value)


@pytest.mark.slow
def test_the_exported_model_gives_the_same_maps(trained, saved, monkeypatch):
    monkeypatch.chdir(saved.parents[3])
    options = ["-cfg", str(ROOT / f"configs/{trained.name}.yaml"), "--exp_dir", "exp", "-cat", "part"]
    monkeypatch.setattr(sys, "argv", ["export_model.py", *options, *(f"-o={override}" for override in OVERRIDES)])
    export_model.main()
    folder = Path("results/inference")
    assert read_description(folder)["input_size"] == list(SIZE)
    images = noise(2, seed=1)
    trained.model.eval()
    with paddle.no_grad():
        expected = [output.numpy() for output in trained.model(paddle.to_tensor(images))]
    assert 0.1 < expected[0].mean() < 0.9
    for actual, output in zip(load_exported(folder).run(images), expected, strict=True):
        np.testing.assert_allclose(actual, output, atol=1e-4)


@pytest.fixture(scope="session", params=VARIABLES)
def real_weights(request):
    """A backbone and a file of its real weights."""
    return request.param, named_by(VARIABLES[request.param])


def test_real_weights_load(real_weights):
    name, file = real_weights
    layer, config = build_backbone(name), load_config(f"configs/{name}.yaml")
    assert load_backbone(layer, config, file, [])["file"] == file
    weights = read_weights(Path(file))
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), np.asarray(weights[key], np.float32), err_msg=key)
    features = layer(paddle.to_tensor(noise(1)))
    assert all(0.01 < x.std().item() < 10 for x in features)


# ---- what the config says of it


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone_name=resnet99"], "dinov2_vits14, dinov2_vits14_reg, not 'resnet99'"),
        (
            ["backbone_name=resnet50"],
            "channels must be [256, 512, 1024] with resnet50 and these scales, not [64, 128, 256]",
        ),
        (["channels=[64]"], "channels must be [64, 128, 256] with resnet18 and these scales, not [64]"),
        (["channels=[]"], "channels must be"),
        (["channels=[64, 128, 255]"], "channels must be"),
        (["scales=[4, 8, 8]"], "scales must be some of [4, 8, 16, 32] with resnet18, in this order, not [4, 8, 8]"),
        (["scales=[8, 4]"], "in this order, not [8, 4]"),
        (["scales=[2, 4]"], "scales must be some of [4, 8, 16, 32]"),
        (["scales=[]"], "scales must be some of"),
        (
            ["scales=[8, 16, 32]"],
            "channels must be [128, 256, 512] with resnet18 and these scales, not [64, 128, 256]; leave them out "
            "(-o channels=null)",
        ),
        (["hidden_ratio=0.001"], "hidden_ratio 0.001"),
    ],
)
def test_what_does_not_fit_the_backbone_is_a_user_error(overrides, message):
    config = load_config("configs/resnet18.yaml", ["input_size=[64, 96]", *overrides])
    with pytest.raises(UserError, match=re.escape(message)):
        FastFlow(config)


@pytest.mark.parametrize("size", [33, 75, 100, 256])
def test_published_scales_fit_at_any_size(size):
    overrides = [f"input_size=[{size}, 40]", "flow_step=1"]
    named = FastFlow(load_config("configs/resnet18.yaml", overrides))
    derived = FastFlow(load_config("configs/resnet18.yaml", [*overrides, "channels=null", "scales=null"]))
    assert [x.shape for x in named.parameters()] == [x.shape for x in derived.parameters()]


# ---- which feature maps


@pytest.mark.parametrize("scales", [[4], [32], [8, 32], [4, 8, 16, 32]])
def test_a_resnet_is_built_as_far_as_it_is_needed(scales):
    paddle.seed(0)
    whole = build_backbone("resnet18", [4, 8, 16, 32])
    layer = build_backbone("resnet18", scales)
    layers = [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(layer, name)]
    assert len(layers) == {4: 1, 8: 2, 16: 3, 32: 4}[scales[-1]]
    layer.set_state_dict({name: value for name, value in whole.state_dict().items() if name in layer.state_dict()})
    images = paddle.to_tensor(noise(1))
    expected = dict(zip([4, 8, 16, 32], whole(images), strict=True))
    for compute in (layer, layer._plain):
        for scale, x in zip(scales, compute(images), strict=True):
            np.testing.assert_allclose(x.numpy(), expected[scale].numpy(), atol=1e-4 * float(expected[scale].std()))


def test_layers_that_are_not_built_are_not_needed_in_a_file_and_others_still_named(tmp_path):
    config = load_config("configs/resnet18.yaml")
    whole = {name: value.numpy() for name, value in build_backbone("resnet18", [4, 8, 16, 32]).state_dict().items()}
    fine = build_backbone("resnet18", [4, 8])
    np.savez(tmp_path / "w.npz", **whole)
    load_backbone(fine, config, str(tmp_path / "w.npz"), [])
    np.savez(tmp_path / "w.npz", **{n: v for n, v in whole.items() if not n.startswith(("layer3.", "layer4."))})
    load_backbone(fine, config, str(tmp_path / "w.npz"), [])
    with pytest.raises(UserError, match=r"layer3\.0\.conv1\.weight is missing"):
        load_backbone(build_backbone("resnet18"), config, str(tmp_path / "w.npz"), [])
    np.savez(tmp_path / "w.npz", **whole, **{"layer2.2.conv1.weight": np.ones(3)})
    with pytest.raises(UserError, match=r"layer2\.2\.conv1\.weight is not part"):
        load_backbone(fine, config, str(tmp_path / "w.npz"), [])


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "asked"), [("[4, 8, 16]", "null"), ("null", "[4, 8, 16]"), ("[8, 16]", "[4, 8]")])
def test_a_checkpoint_belongs_to_its_scales(tmp_path, trained, asked):
    def config(scales):
        return load_config("configs/resnet34.yaml", [*OVERRIDES, "flow_step=1", f"scales={scales}"])

    content = {"epoch": 1, "model_state_dict": published_state(FastFlow(config(trained)))}
    save_checkpoint(tmp_path / "best.pdparams", content | {"config": config(trained).as_dict()})
    if asked == "[4, 8]":
        with pytest.raises(UserError, match=r"trained with scales \[8, 16\], the config says \[4, 8\]"):
            load_model(config(asked), tmp_path / "best.pdparams")
    else:
        load_model(config(asked), tmp_path / "best.pdparams")


# ---- a new one


class Patches(nn.Layer):
    """A map of patches of 7x7 pixels and one of 14x14; what is left over at the border is dropped."""

    def __init__(self, scales, channels=6):
        super().__init__()
        assert scales == (7, 14)
        self.fine = nn.Conv2D(3, channels, 7, stride=7)
        self.coarse = nn.Sequential(nn.BatchNorm2D(channels), nn.ReLU(), nn.Conv2D(channels, 10, 2, stride=2))

    def forward(self, images):
        fine = self.fine(images)
        return [fine, self.coarse(fine)]


def test_a_new_backbone_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(BACKBONES, "patches", Backbone(Patches, levels=(7, 14)))
    config = load_config("configs/resnet34.yaml", ["backbone_name=patches", *OVERRIDES])
    case = trained_model(config)
    assert feature_shapes(case.model.feature_extractor, SIZE) == [(6, 9, 13), (10, 4, 6)]
    assert case.losses[2] < case.losses[0]
    for name, value in case.after.items():
        if name.startswith("feature_extractor."):
            np.testing.assert_array_equal(value, case.before[name], err_msg=name)
    content = {"epoch": 1, "model_state_dict": case.after, "config": config.as_dict()}
    save_checkpoint(tmp_path / "best.pdparams", content)
    model, _ = load_model(config, tmp_path / "best.pdparams")
    case.model.eval()
    images = paddle.to_tensor(noise(2))
    with paddle.no_grad():
        for actual, expected in zip(model(images), case.model(images), strict=True):
            np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-6)
        assert model(images)[0].shape == [2, 1, *SIZE]


def test_a_new_backbone_takes_weight_files(monkeypatch, tmp_path):
    monkeypatch.setitem(BACKBONES, "patches", Backbone(Patches, levels=(7, 14), left_out=("head.",)))
    config = load_config("configs/resnet34.yaml", ["backbone_name=patches", *OVERRIDES])
    weights = {name: value.numpy() for name, value in build_backbone("patches").state_dict().items()}
    layer = build_backbone("patches")
    np.savez(tmp_path / "w.npz", **weights, **{"head.weight": np.ones(3)})
    load_backbone(layer, config, str(tmp_path / "w.npz"), [])
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name])
    np.savez(tmp_path / "w.npz", **weights, **{"fc.weight": np.ones(3)})
    with pytest.raises(UserError, match=r"w\.npz.*fc\.weight"):
        load_backbone(layer, config, str(tmp_path / "w.npz"), [])


def test_an_odd_number_of_channels_is_refused(monkeypatch):
    monkeypatch.setitem(BACKBONES, "patches", Backbone(lambda scales: Patches(scales, 7), levels=(7, 14)))
    with pytest.raises(UserError, match=r"patches.*\[7, 10\] channels.*even"):
        FastFlow(load_config("configs/resnet34.yaml", ["backbone_name=patches"]))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_documented_backbone_works(monkeypatch, language):
    """Its lines stand at the end of models/backbone.py."""
    text = Path(f"docs/{language}/development.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "BACKBONES" in block)
    lines = {**vars(registry), "BACKBONES": dict(BACKBONES)}
    exec(code, lines)
    (name,) = lines["BACKBONES"].keys() - BACKBONES.keys()
    monkeypatch.setitem(BACKBONES, name, lines["BACKBONES"][name])
    config = load_config("configs/resnet34.yaml", [f"backbone_name={name}", *OVERRIDES])
    model = FastFlow(config)
    calibrated_start(model.feature_extractor, noise(4), seed=0)
    losses = [
        training_step(model, build_optimizer(model, config), model.feature_extractor(paddle.to_tensor(noise(4))))
        for _ in range(2)
    ]
    assert losses[1].item() < losses[0].item()
