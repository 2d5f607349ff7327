"""Nothing imports upward: each file may import what stands at its own layer of the list below or under it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top; a module belongs to the longest of these names that it begins with.
LAYERS = (
    ("deploy.common",),
    ("deploy",),
    ("datasets",),
    ("models.cpu",),
    ("models",),
    ("utils",),
    ("benchmarks", "test_tipc"),
    ("train", "eval", "predict", "train_all", "deploy.export_model"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGES = sorted({name.split(".")[0] for name in LEVELS if (ROOT / name.split(".")[0]).is_dir()})
FILES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))]


def imports(node):
    """Names of all that is imported in a part of a syntax tree, within functions too, but not for type checks only."""
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        children = node.orelse
    elif isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import: name the module whole"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for child in children for name in imports(child)]


def level(name):
    """The layer of a module or of something in it; None for what is not ours."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((LEVELS[prefix] for prefix in prefixes if prefix in LEVELS), None)


def upward(name, source):
    """What the module of this name imports from a layer above its own."""
    ours = [other for other in imports(ast.parse(source)) if level(other) is not None]
    return [other for other in ours if level(other) > level(name)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert level(name) is not None, f"{name} has no place in LAYERS"
    assert upward(name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("models.fastflow", "from utils import distributed", ["utils.distributed"]),
        ("models.fastflow", "def f():\n    import utils.config", ["utils.config"]),
        ("models.cpu.flow", "from models import fastflow", ["models.fastflow"]),
        ("models.fastflow", "from models.cpu import flow", []),
        ("models.fastflow", "if TYPE_CHECKING:\n    from utils.config import Config", []),
        ("models.fastflow", "if typing.TYPE_CHECKING:\n    import a\nelse:\n    import utils", ["utils"]),
        ("deploy.infer", "from deploy import export_model", ["deploy.export_model"]),
        ("deploy.export_model", "from utils.options import start", []),
        ("utils.training", "from benchmarks.start import same_model", ["benchmarks.start.same_model"]),
        ("deploy.common.cli", "from deploy import backends", ["deploy.backends"]),
        ("datasets.mvtec", "import numpy, train", ["train"]),
    ],
)
def test_what_counts_as_upward(name, source, expected):
    assert upward(name, source) == expected


def test_deploy_needs_nothing_of_paddle_but_its_inference():
    """And asks for that only within functions: ONNX Runtime and OpenVINO do without."""
    for path in set(ROOT.glob("deploy/**/*.py")) - {ROOT / "deploy/export_model.py"}:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            of_paddle = {name for name in imports(statement) if name.split(".")[0] == "paddle"}
            allowed = {"paddle", "paddle.inference"} if isinstance(statement, ast.FunctionDef | ast.ClassDef) else set()
            assert of_paddle <= allowed, path
