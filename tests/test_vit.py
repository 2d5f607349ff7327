"""Vision Transformers, CaiT among them: the numbers of timm, and weights under the names of those who made them."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import paddle
import pytest

from benchmarks.golden_features import PLACES, TRANSFORMERS, drawn_pictures, drawn_weights, with_depth
from deploy.common.cli import UserError
from models import backbone as registry
from models.backbone import BACKBONES, build_backbone, feature_shapes
from models.fastflow import FastFlow
from models.linear_maps import bicubic_matrix
from tests import torch_files
from utils.config import load_config
from utils.weights import load_backbone

GOLDEN = json.loads(Path("tests/golden_transformers.json").read_text())
DEIT, CAIT, DINO, REGISTERS = TRANSFORMERS
HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in (DEIT, CAIT)]  # of 768 channels
SMALL = {DEIT: (96, 160), CAIT: (96, 160), DINO: (84, 140), REGISTERS: (84, 140)}


def config_of(name, *overrides):
    return load_config("configs/paper/deit.yaml", [f"backbone_name={name}", *overrides])


def drawn(name, depth=2):
    """Weights under timm's names."""
    return drawn_weights(with_depth(GOLDEN[name]["shapes"], depth))


def load(name, file, blocks=(0, 1), size=None):
    layer = build_backbone(name, blocks=blocks, size=size or SMALL[name])
    load_backbone(layer, config_of(name), str(file), [])
    return layer


def loaded(name, folder, weights, **options):
    return load(name, torch_files.save(folder / "w.pth", weights), **options)


def features(layer, size):
    return [x.numpy() for x in layer(paddle.to_tensor(drawn_pictures(*size)))]


# ---- the numbers


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["small", "published size"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_timms(tmp_path, name, case):
    golden = GOLDEN[name]["features"][case]
    blocks, size = golden["blocks"], golden["size"]
    layer = loaded(name, tmp_path, drawn(name, blocks[-1] + 1), blocks=blocks, size=size)
    patch = BACKBONES[name].patch
    for x, expected in zip(features(layer, size), golden["maps"], strict=True):
        assert x.shape == (2, layer.norm.weight.shape[0], size[0] // patch, size[1] // patch)
        assert abs(x.mean() - expected["mean"]) < 1e-4 * expected["std"]
        assert x.std() == pytest.approx(expected["std"], rel=1e-4)
        places = np.linspace(0, x.size - 1, PLACES).astype(int)
        np.testing.assert_allclose(x.ravel()[places], expected["values"], atol=1e-4)


def test_bicubic_interpolation_is_that_of_pillow():
    from PIL import Image

    row = np.random.default_rng(0).random(24, np.float32)
    for size in (9, 10, 24, 31, 70):
        expected = np.asarray(Image.fromarray(row[None]).resize((size, 1), Image.Resampling.BICUBIC))[0]
        np.testing.assert_allclose(bicubic_matrix(24, size) @ row, expected, atol=1e-5)


# ---- the weights


@functools.cache
def timms(name):
    return drawn(name)


def original(name, weights):
    """The same weights as the original repository stores them."""
    weights = dict(weights)
    if name == DEIT:
        return {"model": weights}
    if name == CAIT:
        return {"model": {f"module.{key}": value for key, value in weights.items()}}
    weights["mask_token"] = np.zeros((1, 384), np.float32)
    if name == REGISTERS:
        weights["register_tokens"] = weights.pop("reg_token")
        place = np.full((1, 1, 384), 0.25, np.float32)
        weights["cls_token"] = weights["cls_token"] - place
        weights["pos_embed"] = np.concatenate([place, weights["pos_embed"]], axis=1)
    return weights


@pytest.mark.parametrize("name", [*HEAVY, DINO, REGISTERS])
def test_files_of_the_original_repositories_and_of_paddle_hold_the_same(tmp_path, name):
    expected = loaded(name, tmp_path, timms(name)).state_dict()
    paddle.save(original(name, timms(name)), str(tmp_path / "theirs.pdparams"))
    own = {key: value.numpy() for key, value in expected.items()}  # matrices as Paddle has them
    assert not np.array_equal(own["blocks.0.attn.proj.weight"], timms(name)["blocks.0.attn.proj.weight"])
    np.testing.assert_array_equal(own["blocks.0.attn.proj.weight"], timms(name)["blocks.0.attn.proj.weight"].T)
    np.savez(tmp_path / "paddle.npz", **own)
    for file in ("theirs.pdparams", "paddle.npz"):
        for key, value in load(name, tmp_path / file).state_dict().items():
            np.testing.assert_allclose(value.numpy(), own[key], atol=1e-6, err_msg=f"{file}: {key}")


def test_safetensors_are_read(tmp_path):
    from safetensors.numpy import save_file

    save_file(timms(DINO), tmp_path / "w.safetensors")
    np.testing.assert_array_equal(load(DINO, tmp_path / "w.safetensors").cls_token.numpy(), timms(DINO)["cls_token"])


@pytest.mark.parametrize("name", [*HEAVY, DINO, REGISTERS])
def test_blocks_behind_the_last_one_are_not_built_and_not_needed(tmp_path, name):
    whole = loaded(name, tmp_path, timms(name))
    first = loaded(name, tmp_path, timms(name), blocks=[0])
    assert len(first.blocks) == 1
    needed = {
        key: v for key, v in timms(name).items() if not key.startswith(("blocks.1.", "head", "blocks_token_only"))
    }
    alone = loaded(name, tmp_path, needed, blocks=[0])
    size = SMALL[name]
    for layer in (first, alone):
        np.testing.assert_array_equal(features(layer, size)[0], features(whole, size)[0])


@pytest.mark.parametrize("lacking", ["norm.weight", "pos_embed", "cls_token", "reg_token", "blocks.1.attn.qkv.bias"])
def test_what_is_missing_or_unused_is_named_in_one_line(tmp_path, lacking):
    weights = {name: value for name, value in timms(REGISTERS).items() if name != lacking}
    weights["blocks.0.attn.q_norm.weight"] = np.ones(64, np.float32)
    with pytest.raises(UserError) as error:
        loaded(REGISTERS, tmp_path, weights)
    line = str(error.value)
    assert f"{lacking} is missing; blocks.0.attn.q_norm.weight is not part of this model" in line
    assert "\n" not in line


def test_another_transformers_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="reg_token is missing; pos_embed has shape"):
        loaded(REGISTERS, tmp_path, timms(DINO))
    floats = [np.zeros(shape, np.float32) for shape in ((1, 1369, 7), (1, 0, 384), 5)]
    for name, others in ((REGISTERS, []), (DINO, [np.zeros((1, 1, 384), np.float32)])):
        for wrong in (*floats, np.zeros((1, 9, 384), np.int32), "text", *others):
            paddle.save(timms(name) | {"pos_embed": wrong}, str(tmp_path / "w.pdparams"))
            with pytest.raises(UserError, match="pos_embed"):
                load(name, tmp_path / "w.pdparams")
    narrow = {"register_tokens": np.zeros((1, 4, 384), np.float32), "cls_token": np.zeros((1, 1, 383), np.float32)}
    with pytest.raises(UserError, match="cls_token has shape"):
        loaded(REGISTERS, tmp_path, timms(DINO) | narrow)


def test_a_prefix_that_does_not_belong_can_be_seen(tmp_path):
    with pytest.raises(UserError, match=r"is missing; backbone\.\S+ is not part of this model; .* and \d+ more"):
        loaded(DINO, tmp_path, {f"backbone.{name}": value for name, value in timms(DINO).items()})


# ---- what the config says


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["input_size=[392, 390]"],
            "the sides of input_size, or of tile, must be multiples of 14 with dinov2_vits14, not 392 x 390",
        ),
        (["scales=[16]"], "scales mean nothing with dinov2_vits14, whose feature maps are chosen by blocks"),
        (["blocks=[7, 3]"], "blocks must be some of 0 to 11 with dinov2_vits14, in this order, not [7, 3]"),
        (["blocks=[12]"], "blocks must be some of 0 to 11 with dinov2_vits14, in this order, not [12]"),
        (["blocks=[]"], "blocks must be some of 0 to 11"),
        (["channels=[768]"], "channels must be [384] with dinov2_vits14 and these blocks, not [768]"),
        (
            ["backbone_name=resnet18"],
            "blocks mean nothing with resnet18, whose feature maps are chosen by scales; leave them out (-o",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message):
    config = config_of(DINO, "input_size=56", "blocks=[1]", "flow_step=1", *overrides)
    with pytest.raises(UserError, match=re.escape(message)):
        FastFlow(config)


def test_several_blocks_have_a_flow_each():
    model = FastFlow(config_of(DINO, "input_size=[56, 84]", "blocks=[0, 2, 3]", "flow_step=1"))
    assert len(model.nf_flows) == 3
    model.eval()
    anomaly_map, _, _ = model(paddle.to_tensor(drawn_pictures(56, 84)))
    assert anomaly_map.shape == [2, 1, 56, 84]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_documented_transformer_works(monkeypatch, language):
    text = Path(f"docs/{language}/development.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(BACKBONES\S+ = transformer\(.*?\))`", text)
    lines = {**vars(registry), "BACKBONES": dict(BACKBONES)}
    exec(line, lines)
    (name,) = lines["BACKBONES"].keys() - BACKBONES.keys()
    monkeypatch.setitem(BACKBONES, name, lines["BACKBONES"][name])
    layer = build_backbone(name, blocks=[0], size=(48, 64))
    assert features(layer, (48, 64))[0].shape == (2, 384, 3, 4)


# Image size, features, couplings, trainable parameters: the paper's table (arXiv 2111.07677).
PAPER = {
    "resnet18": (256, [(64, 64, 64), (128, 32, 32), (256, 16, 16)], 8, 4.9e6),
    "wide_resnet50_2": (256, [(256, 64, 64), (512, 32, 32), (1024, 16, 16)], 8, 41.3e6),
    "deit": (384, [(768, 24, 24)], 20, 14.8e6),
    "cait": (448, [(768, 28, 28)], 20, 14.8e6),
}


@pytest.mark.slow
def test_the_papers_table(capsys):
    """Printed by the code. Of the transformers one block is built: the flows do not ask how many there are."""
    for name, (size, shapes, couplings, parameters) in PAPER.items():
        config = load_config(f"configs/paper/{name}.yaml")
        assert (config.input_size, config.blocks) == (size, {"deit": [7], "cait": [40]}.get(name))
        model = FastFlow(dataclasses.replace(config, blocks=config.blocks and [0]))
        assert feature_shapes(model.feature_extractor, config.size) == shapes
        subnets = [subnet for flow in model.nf_flows for step in flow.module_list for subnet in step.subnets]
        assert len(subnets) == couplings * len(shapes)
        kernels = [subnet[0].weight.shape[-1] for subnet in subnets[:4]]
        assert kernels == ([3, 3, 3, 3] if name == "resnet18" else [3, 3, 1, 1])
        assert model.trainable_parameters() == pytest.approx(parameters, rel=0.01)
        if name in ("deit", "cait"):
            assert subnets[0][0].weight.shape[0] == 128
        with capsys.disabled():
            print(f"\n{name:16} {size} {shapes} {couplings:2} {model.trainable_parameters() / 1e6:.1f} M", end="")
