"""The requirement files agree with each other and with what is imported."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
}
# What only the service may import; FastAPI is made of two of them and brings them.
SERVICE = {"serve.py", "service.py"}
OF_FASTAPI = {"pydantic", "starlette"}


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


def test_what_the_product_imports_is_required():
    known = imported_names("requirements.txt") | imported_names("requirements-deploy.txt")
    known_to_service = known | imported_names("requirements-serve.txt") | OF_FASTAPI
    own = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = [
        *ROOT.glob("*.py"),
        *(path for part in ("models", "datasets", "utils", "deploy") for path in ROOT.glob(f"{part}/*.py")),
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                allowed = known_to_service if path.name in SERVICE else known
                assert top in allowed | own | sys.stdlib_module_names, f"{path.name} imports {top}"
