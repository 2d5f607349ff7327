"""What several test files share."""

import pytest

from deploy import runtime

runtime.setup()  # before any test module imports paddle


@pytest.fixture(scope="session")
def config():
    """The published configuration."""
    from utils.config import load_config

    return load_config("configs/resnet18.yaml")
