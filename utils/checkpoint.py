"""Checkpoints in the published layout.

`results/{exp_dir}/{category}/best.pdparams` and `last.pdparams` hold a dictionary in `paddle.save` format with
`epoch`, `model_state_dict` and `optimizer_state_dict`, as published, and beside them what the published files do
not have: `backbone` (provenance), `config`, `history` (one row per epoch), `held_out` (names of the good training
pictures that training did not see), `learnt_from` (a digest of the names of those that it did see), `average` (with a
moving average of the weights, which is then what `model_state_dict` holds: the parameters that training goes on from),
`loss_scale` (in float16 training), `roi` (the bytes of a PNG, where there is a region of interest) and `draws_tiles`
(whether the places of tiles are drawn anew in each epoch, where there are tiles).
"""

import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from deploy.common.cli import UserError
from deploy.common.files import write_whole
from deploy.common.imaging import png
from deploy.common.tiles import Layout, read_roi
from models.backbone import BACKBONES
from models.fastflow import FastFlow, FlowStep
from utils.config import Config, check_known, keys_that_decide, updated
from utils.history import EpochRow
from utils.pickles import load_pickle
from utils.results import OFFLINE
from utils.weights import set_state

MODEL_KEYS = keys_that_decide("model")


def published_state(model: FastFlow) -> dict[str, np.ndarray]:
    """The model's arrays under the published names; the permutations as 1x1 convolution kernels.

    `w_perm[i, permutation[i]] = 1`, `w_perm_inv` its transpose, both (C, C, 1, 1).
    """
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, step in _flow_steps(model):
        kernel = np.eye(len(step.permutation), dtype=np.float32)[step.permutation.numpy()]
        state[f"{name}.w_perm"] = kernel[:, :, None, None]
        state[f"{name}.w_perm_inv"] = kernel.T[:, :, None, None].copy()
    return state


def set_published_state(model: FastFlow, state: dict[str, np.ndarray], source: str) -> None:
    """Fill the model from arrays under the published names, the permutations included.

    `subnet_2.*`, which published files hold and no result of theirs depends on, is ignored unless each coupling has a
    subnet.

    Raises:
        UserError: keys are missing, unknown or misshapen, numbers are not finite, or a `w_perm` is no permutation.
    """
    if not isinstance(state, dict):
        raise UserError(f"{source}: holds no model_state_dict")
    unused = ".subnet_2." if model.config.share_subnet else None
    state = {name: value for name, value in state.items() if not unused or unused not in str(name)}
    permutations = []
    for name, step in _flow_steps(model):
        kernel = state.pop(f"{name}.w_perm", None)
        state.pop(f"{name}.w_perm_inv", None)
        channels = len(step.permutation)
        if not isinstance(kernel, np.ndarray) or kernel.shape != (channels, channels, 1, 1):
            wanted = [channels, channels, 1, 1]
            raise UserError(f"{source}: does not fit this model: {name}.w_perm must be there and have shape {wanted}")
        permutation = kernel[:, :, 0, 0].argmax(axis=1)
        if not np.array_equal(kernel[:, :, 0, 0], np.eye(channels)[permutation]) or len(set(permutation)) < channels:
            raise UserError(f"{source}: {name}.w_perm is not a permutation")
        permutations.append((step, permutation))
    set_state(model, state, source)
    for step, permutation in permutations:
        step.permutation.set_value(permutation.astype(np.int64))


def history_of(checkpoint: dict[str, Any], path: Path) -> list[EpochRow]:
    """The epochs up to a checkpoint that train.py wrote to `path`.

    Raises:
        UserError: it holds none.
    """
    try:
        return _history(checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise not_ours(path, error) from error


def not_ours(path: Path, error: Exception) -> UserError:
    """The error of a checkpoint that lacks what train.py writes."""
    return UserError(f"{path}: not written by this train.py; --resume cannot go on from it ({error})")


def _history(checkpoint: dict[str, Any]) -> list[EpochRow]:
    """The rows of its history, or a ValueError or TypeError."""
    rows = [EpochRow(**row) for row in checkpoint["history"]]
    if len(rows) != checkpoint["epoch"] or not rows:
        raise ValueError("its history does not end with its epoch")
    for number, row in enumerate(rows, start=1):
        measured = (row.image_auroc, row.pixel_auroc, row.selection, row.val_loss)
        values = [row.loss, row.lr, row.seconds, *(value for value in measured if value is not None)]
        counted = row.steps is None or (type(row.steps) is int and row.steps >= 0)
        sound = type(row.epoch) is int and row.epoch == number and counted
        if not sound or not all(type(value) is float for value in values):
            raise ValueError(f"its history is damaged at epoch {number}")
    return rows


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write the dictionary in `paddle.save` format, whole."""
    write_whole(path, lambda name: paddle.save(content, name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, ours or a published one, without running anything in it.

    Raises:
        UserError: missing, damaged, or not a checkpoint, be it only in what it says of its training.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; train first, or check --exp_dir and the category")
    checkpoint = load_pickle(path)
    if not isinstance(checkpoint, dict) or not {"epoch", "model_state_dict"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint (it must hold epoch and model_state_dict)")
    config, backbone, held_out = (
        checkpoint.get("config", {}),
        checkpoint.get("backbone"),
        checkpoint.get("held_out", []),
    )
    sound = {
        "epoch": isinstance(checkpoint["epoch"], int),
        "config": isinstance(config, dict),
        "backbone": backbone is None or _is_provenance(backbone),
        "held_out": isinstance(held_out, list) and all(isinstance(name, str) for name in held_out),
    }
    for part in sound:
        if not sound[part]:
            raise UserError(f"{path}: not a checkpoint (its {part} is not what train.py writes)")
    check_known(config, f"{path}: not a checkpoint; its config")
    return checkpoint


def _is_provenance(value: Any) -> bool:
    """Whether it is what `utils.weights.load_backbone` returns."""
    if not isinstance(value, dict) or value.keys() != {"source", "file", "sha256"}:
        return False
    kinds = {type(value["file"]), type(value["sha256"])}
    return isinstance(value["source"], str) and kinds == ({type(None)} if value["source"] == OFFLINE else {str})


def epoch_of(checkpoint: dict[str, Any]) -> int:
    """The epoch that a checkpoint was written after, counted from 1; published files, without history, count from 0."""
    return int(checkpoint["epoch"]) + ("history" not in checkpoint)


def white_level_of(checkpoint: dict[str, Any], config: Config) -> int | None:
    """The value of white in 16-bit pictures for this checkpoint: the config's, else that of its training."""
    return config.white_level or checkpoint.get("config", {}).get("white_level")


def stored_roi(roi: np.ndarray | None) -> dict[str, np.ndarray]:
    """What a checkpoint holds of a region of interest, (h, w) bool: its PNG as (n,) uint8; nothing where there is none.

    See `roi_of`.
    """
    return {} if roi is None else {"roi": np.frombuffer(png(roi, 255), np.uint8)}


def roi_of(checkpoint: dict[str, Any], path: Path) -> np.ndarray | None:
    """The region of interest of what `load_checkpoint` has read of `path`, (h, w) bool; None: there is none.

    Raises:
        UserError: it is damaged.
    """
    if "roi" not in checkpoint:
        return None
    try:
        return read_roi(path, io.BytesIO(np.asarray(checkpoint["roi"], np.uint8).tobytes()))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a checkpoint (its roi is not what train.py writes)") from error


def layout_of(checkpoint: dict[str, Any], config: Config, path: Path) -> Layout:
    """What is done with a picture on its way through the model of a checkpoint.

    Raises:
        UserError: as `roi_of`.
    """
    return replace(config.layout, roi=roi_of(checkpoint, path))


def selection_of(checkpoint: dict[str, Any], is_last: bool) -> str:
    """How a checkpoint was chosen among the epochs, a key of `utils.results.SELECTIONS`.

    Args:
        checkpoint: what `load_checkpoint` returns.
        is_last: whether it is `last.pdparams`.
    """
    trained = checkpoint.get("config", {})
    selection = trained.get("selection", "test_auroc")  # the rule of published files
    if trained.get("eval_interval") == -1:  # nothing was measured that could choose
        return "last"
    if not is_last:
        return selection
    all_epochs = checkpoint["epoch"] == trained.get("epochs", checkpoint["epoch"])
    return "last" if selection == "last" or all_epochs else "last_by_patience"


def load_model(
    config: Config, path: Path, own_overrides: Sequence[str] | None = None
) -> tuple[FastFlow, dict[str, Any]]:
    """The model of a checkpoint, backbone included, in eval mode; and the checkpoint.

    Args:
        config: of the model.
        path: the checkpoint.
        own_overrides: if not None, the checkpoint's own settings, with these overrides, take the place of those of the
            config, as far as it holds any: published files hold none.

    Raises:
        UserError: no such file, damaged, of another architecture, or trained under settings that the config changes.
    """
    checkpoint = load_checkpoint(path)
    largest = math.inf
    if own_overrides is not None:
        config = updated(config, checkpoint.get("config", {}), f"{path}: its config", own_overrides)
        largest = path.stat().st_size / 4  # of float32: a stranger's settings may ask for more than the memory holds
    try:
        model = FastFlow.blank(config, largest)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    fill_model(model, config, checkpoint, path)
    model.eval()
    return model, checkpoint


def fill_model(model: FastFlow, config: Config, checkpoint: dict[str, Any], path: Path) -> None:
    """Fill the model from what `load_checkpoint` has read of `path`.

    Raises:
        UserError: it is of another architecture, or was trained under settings of the model that the config changes.
    """
    # Published files do not say; their steps have one subnet, and another one that is never used.
    trained = {**config.as_dict(), "share_subnet": True, **checkpoint.get("config", {})}
    wanted = config.as_dict()
    changed = [key for key in MODEL_KEYS if _meaning(key, trained) != _meaning(key, wanted)]
    advice = "".join(
        f"; it was trained with {key} {trained[key]}, the config says {getattr(config, key)}" for key in changed
    )
    if changed:
        overrides = " ".join("-o " + shlex.quote(f"{key}={trained[key]}") for key in changed)
        advice += f": give -cfg {path.parent / 'config.yaml'} or {overrides}"
    try:
        set_published_state(model, checkpoint["model_state_dict"], str(path))
    except UserError as error:
        raise UserError(f"{error}{advice}") from error
    if changed:
        raise UserError(f"{path}: does not fit this config{advice}")


def _meaning(key: str, settings: dict[str, Any]) -> Any:
    """What to compare of a setting: a number as a size is that of a square, no `scales` or `blocks` the usual ones."""
    value = settings[key]
    if key in ("input_size", "tile") and isinstance(value, int):
        return [value, value]
    backbone = BACKBONES.get(settings["backbone_name"])
    if backbone and key == backbone.key and value is None:
        return list(backbone.chosen)
    return value


def _flow_steps(model: FastFlow) -> list[tuple[str, FlowStep]]:
    return [(name, layer) for name, layer in model.named_sublayers() if isinstance(layer, FlowStep)]
