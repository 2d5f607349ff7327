"""What several test files share."""

import os
from collections import Counter
from pathlib import Path

import pytest

from deploy.common import runtime
from tests import forked

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core; more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # in place of what the controller has set for itself
runtime.import_paddle()  # before any test module imports paddle


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: a worker for each core and one more, for many tests wait; 8 at most, for so few files take long."""
    return min(runtime.available_cores() + 1, 8)


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first, so that workers who take a file at a time end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def config():
    """The published configuration."""
    from utils.config import load_config

    return load_config("configs/resnet18.yaml")


@pytest.fixture(autouse=True)
def no_backbone_weights_of_the_user(monkeypatch):
    """Tests start without the user's own weights, whatever the environment says; those that want them ask for them."""
    for name in os.environ:
        if name.startswith(("FASTFLOW_BACKBONE_WEIGHTS", "FASTFLOW_WEIGHTS_")):
            monkeypatch.delenv(name)


def named_by(variable: str) -> str:
    """What the environment variable names; without it the test is skipped and says so."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set")
    return path


@pytest.fixture(scope="session")
def imagenet_weights():
    """A file of real ImageNet weights."""
    return named_by("FASTFLOW_BACKBONE_WEIGHTS")


@pytest.fixture(scope="session")
def mvtec():
    """The folder of the real MVTec AD."""
    return named_by("FASTFLOW_MVTEC_DIR")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of an exported model that is small enough for seconds, trained for one epoch on lite_data."""
    folder = tmp_path_factory.mktemp("exported")
    common = ["-cfg", f"{ROOT}/configs/resnet18.yaml", "-o", "input_size=64", "-o", "flow_step=1"]
    common += ["-o", "pretrained=offline", "--exp_dir", "exp", "--category", "bottle"]
    for script, options in (
        ("train.py", ["--data", f"{ROOT}/lite_data", "--epochs", "1"]),
        ("deploy/export_model.py", ["--save_inference_dir", f"{folder}/inference"]),
    ):
        forked.run(script, [*common, *options], folder).check_returncode()
    return folder / "inference"
