"""What several test files share."""

import os

import pytest

from deploy import runtime

runtime.setup()  # before any test module imports paddle


@pytest.fixture(scope="session")
def config():
    """The published configuration."""
    from utils.config import load_config

    return load_config("configs/resnet18.yaml")


@pytest.fixture(autouse=True)
def no_backbone_weights_of_the_user(monkeypatch):
    """Tests start without the user's own weights, whatever the environment says; those that want them ask for them."""
    monkeypatch.delenv("FASTFLOW_BACKBONE_WEIGHTS", raising=False)


@pytest.fixture(scope="session")
def imagenet_weights():
    """Real ImageNet weights, if FASTFLOW_BACKBONE_WEIGHTS names them."""
    path = os.environ.get("FASTFLOW_BACKBONE_WEIGHTS")
    if not path:
        pytest.skip("FASTFLOW_BACKBONE_WEIGHTS is not set")
    return path


@pytest.fixture(scope="session")
def mvtec():
    """The real MVTec AD folder, if FASTFLOW_MVTEC_DIR names it."""
    path = os.environ.get("FASTFLOW_MVTEC_DIR")
    if not path:
        pytest.skip("FASTFLOW_MVTEC_DIR is not set")
    return path
