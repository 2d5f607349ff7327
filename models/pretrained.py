"""Where the backbone's weights come from, in the order in which the sources are tried."""

import hashlib
import os
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from deploy.cli import UserError, warn
from deploy.files import write_whole
from models.offline_start import calibrated_start
from utils.pickles import load_pickle
from utils.states import set_state

VARIABLE = "FASTFLOW_BACKBONE_WEIGHTS"
DOWNLOAD_TIMEOUT = 5  # seconds without an answer
ADVICE = (
    f"give real ImageNet weights with --backbone_weights FILE or {VARIABLE}=FILE "
    "(.pdparams, .npz or .safetensors), or train once with internet access"
)


@dataclass(frozen=True)
class Provenance:
    """Which weights a backbone holds; stored in every checkpoint."""

    source: str  # option, environment, cache, download, offline
    file: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        if self.source == "offline":
            return "offline start (calibrated fixed-seed filters, no ImageNet weights)"
        return f"{self.file} ({self.source}, sha256 {self.sha256[:12]})"

    def as_dict(self) -> dict[str, str | None]:
        """For a checkpoint or JSON."""
        return asdict(self)


def load_backbone(
    backbone: nn.Layer,
    pretrained: str,
    weights_file: str | None,
    training_images: Callable[[], np.ndarray],
    seed: int,
) -> Provenance:
    """Fill the backbone and say from where.

    Tried in this order: `weights_file` (--backbone_weights), the file that FASTFLOW_BACKBONE_WEIGHTS names,
    Paddle's weight cache, one download of Paddle's official file, and the offline start. With
    `pretrained="offline"` and no file given, the offline start at once.

    Args:
        backbone: filled in place.
        pretrained: `imagenet` or `offline`.
        weights_file: value of --backbone_weights.
        training_images: gives the normalised training images (N, 3, H, W) that calibrate the offline start.
        seed: of the offline start.

    Raises:
        UserError: a file that was named is missing, damaged or of another architecture.
    """
    for source, file in (("option", weights_file), ("environment", os.environ.get(VARIABLE))):
        if file:
            return _load_file(backbone, Path(file), source)
    if pretrained == "imagenet":
        cached = official_file()
        try:
            if cached.exists():
                return _load_file(backbone, cached, "cache")
            download_official(cached)
            return _load_file(backbone, cached, "download")
        except UserError as error:
            warn(str(error))
    calibrated_start(backbone, training_images(), seed)
    line = "!" * 100
    warn(
        f"\n{line}\n!! NO IMAGENET WEIGHTS: the backbone is an offline start made from fixed-seed filters.\n"
        "!! Accuracy figures mean NOTHING until the real weights are given:\n"
        f"!! {ADVICE}.\n{line}"
    )
    return Provenance("offline")


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name of a .pdparams, .npz or .safetensors file; nothing in it can run code.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    if path.suffix == ".pdparams":
        return load_pickle(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(f"{path}: cannot be read as weights ({error})") from error
    raise UserError(f"{path}: backbone weights must be a .pdparams, .npz or .safetensors file")


def official_file() -> Path:
    """Where Paddle keeps its official ResNet18 weights."""
    from paddle.utils.download import WEIGHTS_HOME
    from paddle.vision.models.resnet import model_urls

    return Path(WEIGHTS_HOME) / Path(model_urls["resnet18"][0]).name


def download_official(target: Path) -> None:
    """Download Paddle's official ResNet18 weights: one attempt, checksum verified, written whole.

    Raises:
        UserError: no connection, or the file is not what Paddle published.
    """
    from paddle.vision.models.resnet import model_urls

    url, md5 = model_urls["resnet18"]

    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length", 0)) or None
            content = bytearray()
            with tqdm(total=size, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
                while block := answer.read(1 << 16):
                    content += block
                    bar.update(len(block))
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(f"backbone weights: not in {target.parent}, and {url} cannot be had ({error})") from error
    if hashlib.md5(content).hexdigest() != md5:
        raise UserError(f"backbone weights: what {url} sent is damaged or changed (wrong checksum); not used")
    write_whole(target, lambda name: Path(name).write_bytes(content))


def _load_file(backbone: nn.Layer, path: Path, source: str) -> Provenance:
    weights = {name: value for name, value in read_weights(path).items() if not name.startswith(("layer4.", "fc."))}
    set_state(backbone, weights, str(path))
    return Provenance(source, str(path), hashlib.sha256(path.read_bytes()).hexdigest())
