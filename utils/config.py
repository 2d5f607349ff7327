"""The configuration: read once, checked once, then passed down."""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.common.cli import LARGEST_SIDE, UserError
from deploy.common.plain_yaml import parse_yaml, read_yaml


@dataclass(frozen=True)
class SelectionWeights:
    """Weights of the two AUROCs in the figure that chooses the best checkpoint."""

    image: float = 0.5
    pixel: float = 0.5


@dataclass(frozen=True)
class Config:
    """Everything that decides a result. The comments in configs/resnet18.yaml say what each key means."""

    backbone_name: str  # models.backbone knows them
    input_size: int | list[int]
    use_norm: bool
    momentum: float
    flow_step: int
    hidden_ratio: float
    conv3x3_only: bool
    clamp: float
    channels: list[int] | None = None
    scales: list[int] | None = None
    pretrained: Literal["imagenet", "offline"] = "imagenet"
    mask_rule: Literal["published", "half"] = "published"
    seed: int = 0
    epochs: int = 500
    batch_size: int = 32
    lr: float = 1e-3
    lr_schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 1e-5
    clip_norm: float = 0.9
    feature_noise: float = 0.0
    ema_decay: float = 0.0
    holdout: float = 0.0
    eval_interval: int = 1
    selection: Literal["test_auroc", "last", "val_likelihood"] = "test_auroc"
    patience: int = 30
    selection_weights: SelectionWeights = dataclasses.field(default_factory=SelectionWeights)
    amp: bool = False
    log_interval: int = 10

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that the model takes, in pixels."""
        height, width = self.input_size if isinstance(self.input_size, list) else (self.input_size, self.input_size)
        return height, width

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, as in the YAML file."""
        return dataclasses.asdict(self)


# Keys that make no sense below a bound, of a list each entry; every other number may be anything of its type.
LOWEST = {
    "input_size": 32,
    "scales": 1,
    "flow_step": 1,
    "epochs": 1,
    "batch_size": 1,
    "eval_interval": 1,
    "patience": 1,
    "log_interval": 1,
    "seed": 0,
    "weight_decay": 0,
    "feature_noise": 0,
    "ema_decay": 0,
    "holdout": 0,
    "selection_weights.image": 0,
    "selection_weights.pixel": 0,
}
HIGHEST = {
    "ema_decay": 0.9999,
    "holdout": 0.5,
    "input_size": LARGEST_SIDE,
    "flow_step": 64,  # from here on: beyond it memory ends, not sense
    "hidden_ratio": 64,
    "epochs": 1_000_000,  # each checkpoint holds the whole history
}
POSITIVE = {"lr", "clip_norm", "clamp", "hidden_ratio"}


def load_config(path: str | Path, overrides: Sequence[str] = (), **options: Any) -> Config:
    """Read a YAML config, apply `key=value` overrides (dotted keys), then command-line options.

    Args:
        path: the YAML file.
        overrides: strings like `lr=0.0005` or `selection_weights.image=1`; values are YAML.
        options: config keys given as command-line options of their own; None means not given.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, value out of range.
    """
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:  # ValueError: no YAML, or a name that no file can have
        raise UserError(f"config {path}: cannot be read ({error}); give a YAML file with -cfg") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path}: must hold `key: value` lines, see configs/resnet18.yaml")
    for override in overrides:
        _override(values, override)
    values.update({key: value for key, value in options.items() if value is not None})
    return parse_config(values, f"config {path}")


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Check a plain dictionary and turn it into a Config; `source` starts the error message."""
    config = _build(Config, values, source, prefix="")
    if isinstance(config.input_size, list) and len(config.input_size) != 2:
        raise UserError(f"{source}: input_size must be a whole number or [height, width], not {config.input_size}")
    if config.seed >= 2**63:
        raise UserError(f"{source}: seed must be below 2**63, not {config.seed}")
    if config.selection_weights.image + config.selection_weights.pixel <= 0:
        raise UserError(f"{source}: selection_weights: image and pixel must not both be 0")
    if config.selection == "val_likelihood" and not config.holdout:
        raise UserError(f"{source}: selection val_likelihood needs pictures to measure it on; set holdout, e.g. to 0.1")
    if not 0 <= config.momentum <= 1:
        raise UserError(f"{source}: momentum must be between 0 and 1, not {config.momentum}")
    return config


def check_known(values: dict[str, Any], source: str) -> None:
    """Check those keys of a stored configuration that there are; one of another version may lack some or have more.

    Raises:
        UserError: wrong type, value out of range.
    """
    for name, type_ in typing.get_type_hints(Config).items():
        if name in values:
            _check(type_, values[name], source, name)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"-o {override}: must be key=value, for example -o lr=0.0005")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"-o {override}: the value cannot be read ({error})") from error
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"-o {override}: {parent} is not a group of keys")
    values[last] = value


def _build(cls: type, values: dict[Any, Any], source: str, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            known = ", ".join(prefix + name for name in fields)
            raise UserError(f"{source}: unknown key {prefix}{key}; known keys: {known}")
    types_ = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _check(types_[name], values[name], source, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: key {prefix}{name} is missing; configs/resnet18.yaml has them all")
    return cls(**arguments)


def _check(type_: Any, value: Any, source: str, key: str) -> Any:
    """Return `value` as `type_`, or raise one line that says what the key takes."""

    def refuse(wanted: str) -> UserError:
        return UserError(f"{source}: {key} must be {wanted}, not {value!r}")

    if dataclasses.is_dataclass(type_):
        if not isinstance(value, dict):
            raise refuse("a group of keys")
        return _build(type_, value, source, prefix=f"{key}.")
    origin = typing.get_origin(type_)
    if origin is types.UnionType:  # of a list and one other
        if value is None and types.NoneType in typing.get_args(type_):
            return None
        (type_,) = (t for t in typing.get_args(type_) if (typing.get_origin(t) is list) == isinstance(value, list))
        return _check(type_, value, source, key)
    if origin is Literal:
        choices = typing.get_args(type_)
        if not isinstance(value, str) or value not in choices:
            raise refuse("one of " + ", ".join(choices))
        return value
    if origin is list:
        (item,) = typing.get_args(type_)
        if not isinstance(value, list):
            raise refuse("a list")
        return [_check(item, entry, source, f"{key}[{i}]") for i, entry in enumerate(value)]
    if type_ is float:
        value = _number(value)  # YAML reads 1e-3 as text
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", types.NoneType: "a list"}
    if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
        raise refuse(names[type_])
    if type_ is float and not math.isfinite(value):
        raise refuse("a finite number")
    bound = key.partition("[")[0]
    if bound in LOWEST and not value >= LOWEST[bound]:  # not >=: refuses NaN too
        raise refuse(f"at least {LOWEST[bound]}")
    if bound in HIGHEST and value > HIGHEST[bound]:
        raise refuse(f"at most {HIGHEST[bound]}")
    if key in POSITIVE and not value > 0:
        raise refuse("greater than 0")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value
