"""Cached features are the computed ones, wherever they are kept."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from deploy.common.tiles import Layout
from models.backbone import build_backbone
from utils.features import CacheBudget, FeatureCache

PATHS = sorted(Path("lite_data/bottle/train/good").glob("*.png"))[:11]
LAYOUT = Layout((64, 96))
FEATURE_BYTES = 4 * 11 * (64 * 16 * 24 + 128 * 8 * 12 + 256 * 4 * 6)
PICTURE_BYTES = 11 * 64 * 96 * 3


@pytest.fixture(scope="module")
def backbone():
    paddle.seed(0)
    return build_backbone("resnet18")


@pytest.mark.parametrize(
    ("device", "memory", "disk", "place"),
    [
        (FEATURE_BYTES, 0, 0, "device"),
        (FEATURE_BYTES - 1, FEATURE_BYTES, 0, "memory"),
        (0, FEATURE_BYTES - 1, FEATURE_BYTES, "file"),
        (0, PICTURE_BYTES, FEATURE_BYTES - 1, "pictures"),
        (0, PICTURE_BYTES - 1, 0, "nothing"),
    ],
)
def test_every_place_gives_the_same_features(backbone, device, memory, disk, place):
    budget = CacheBudget(memory, disk, device)
    cache = FeatureCache(backbone, PATHS, LAYOUT, budget, "test")
    assert cache.place == place
    assert len(cache) == 11
    reference = FeatureCache(backbone, PATHS, LAYOUT, CacheBudget(1e12, 0), "test")
    indices = np.array([7, 0, 10, 3])
    for actual, expected in zip(cache.batch(indices), reference.batch(indices), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    taken = {"device": FEATURE_BYTES, "memory": FEATURE_BYTES, "file": FEATURE_BYTES, "pictures": PICTURE_BYTES}
    where = {"file": "disk", "pictures": "memory"}.get(place, place)
    for name, limit in {"device": device, "memory": memory, "disk": disk}.items():
        assert getattr(budget, name) == limit - (taken[place] if name == where else 0)


def test_two_caches_share_one_budget(backbone):
    budget = CacheBudget(1.5 * FEATURE_BYTES, 0)
    places = [FeatureCache(backbone, PATHS, LAYOUT, budget, "test").place for _ in range(2)]
    assert places == ["memory", "pictures"]


def test_a_file_of_features_without_posix_fallocate(backbone, monkeypatch):
    """As on macOS and Windows; with it the file is tested above."""
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("utils.features.BLOCK", 1000)  # the last one is shorter
    cache = FeatureCache(backbone, PATHS, LAYOUT, CacheBudget(0, 1e12), "test")
    assert cache.place == "file"
    reference = FeatureCache(backbone, PATHS, LAYOUT, CacheBudget(1e12, 0), "test")
    for actual, expected in zip(cache.batch(np.arange(3)), reference.batch(np.arange(3)), strict=True):
        np.testing.assert_array_equal(actual.numpy(), expected.numpy())


@pytest.mark.parametrize("system", ["linux", "other"])
def test_the_disk_that_turns_out_full(backbone, monkeypatch, system):
    def full(*_):
        raise OSError(28, "No space left on device")

    if system == "linux":
        monkeypatch.setattr("os.posix_fallocate", full)
    else:
        monkeypatch.delattr("os.posix_fallocate")
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "wb"))  # noqa: SIM115
    assert FeatureCache(backbone, PATHS, LAYOUT, CacheBudget(0, 1e12), "test").place == "nothing"


def test_a_disk_that_is_full_has_no_room(monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")  # what Python says then

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert CacheBudget.from_options(1, None, None) == CacheBudget(2**30, 0)


def test_a_cpu_has_no_memory_of_its_own():
    assert CacheBudget.from_options(1, 1, 1).device == 0


def test_budget_from_options(monkeypatch):
    monkeypatch.setattr("utils.features.available_memory", lambda: 1000)
    assert CacheBudget.from_options(None, 2, None).memory == 500
    assert CacheBudget.from_options(0.5, 2, None) == CacheBudget(2**29, 2**31)
    assert CacheBudget.from_options(0, None, None).disk > 0
