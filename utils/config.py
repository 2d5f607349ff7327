"""The configuration: read once, checked once, then passed down. `python -m utils.config` lists its keys."""

import copy
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.common.cli import LARGEST_SIDE, ArgumentParser, UserError, run_main
from deploy.common.plain_yaml import parse_yaml, read_yaml
from deploy.common.tiles import ORIGINAL, OVERLAP, Layout, score_pixels

# Bounds of a number, of a list those of each entry: in a message, in a table, the comparison.
BOUNDS = {
    "least": ("at least", "≥", operator.ge),
    "above": ("greater than", ">", operator.gt),
    "most": ("at most", "≤", operator.le),
}
TITLES = {
    "en": ("key", "type or choices", "default", "bounds", "meaning"),
    "zh": ("键", "类型或选项", "默认值", "范围", "含义"),
}


def key(en: str, zh: str, default: Any = dataclasses.MISSING, *, decides: str | None = None, **bounds: float) -> Any:
    """A key of the configuration, all there is to say of it.

    Args:
        en: what it means.
        zh: the same in Chinese.
        default: its value where a file does not have it; without one every file must.
        decides: what of a trained checkpoint depends on it: `model`, what its parameters mean, so that no other value
            will do; `resume`, whether --resume can go on from it; `training`, what further epochs make of it, of which
            --resume warns. None: nothing.
        bounds: of those in `BOUNDS`. Without any a number may be whatever its type can hold that is finite.
    """
    return dataclasses.field(default=default, metadata={"en": en, "zh": zh, "decides": decides, **bounds})


@dataclass(frozen=True)
class SelectionWeights:
    """Weights of the two AUROCs in the figure that chooses the best checkpoint."""

    image: float = key(
        "weight of the image AUROC where selection is test_auroc",
        "selection 为 test_auroc 时图像 AUROC 的权重",
        0.5,
        least=0,
    )
    pixel: float = key("weight of the pixel AUROC; not both are 0", "像素 AUROC 的权重；两者不能都为 0", 0.5, least=0)


@dataclass(frozen=True)
class Config:
    """Everything that decides a result."""

    backbone_name: str = key(
        "one that models/backbone.py knows, such as resnet18",
        "models/backbone.py 中的名字，例如 resnet18",
        decides="model",
    )
    input_size: int | list[int] | Literal["original"] = key(
        "side of the square pictures in pixels, to which pictures are resized; [height, width] for another shape; "
        "original, with `tile`: they are not resized",
        "图片缩放到的正方形边长，像素；其他形状写 [高, 宽]；original（与 `tile` 合用）：不缩放",
        decides="model",
        least=32,
        most=LARGEST_SIDE,
    )
    use_norm: bool = key(
        "one trainable BatchNorm per scale before the flow", "每个尺度在流之前有一个可训练的 BatchNorm", decides="model"
    )
    momentum: float = key(
        "of that BatchNorm: running = momentum * running + (1 - momentum) * batch",
        "该 BatchNorm 的动量：滑动值 = 动量 × 滑动值 + (1 - 动量) × 批",
        decides="training",
        least=0,
        most=1,
    )
    flow_step: int = key("steps per flow", "每个流的步数", decides="model", least=1, most=64)
    hidden_ratio: float = key(
        "hidden channels of a coupling subnet / its input channels",
        "耦合子网络的隐藏通道数 / 输入通道数",
        decides="model",
        above=0,
        most=64,
    )
    conv3x3_only: bool = key(
        "False: every second step uses 1x1 convolutions", "False：每隔一步使用 1x1 卷积", decides="model"
    )
    clamp: float = key(
        "the log of the coupling's scale stays within (-clamp, clamp)",
        "耦合层缩放的对数限制在 (-clamp, clamp) 之内",
        decides="model",
        above=0,
    )
    channels: list[int] | None = key(
        "of the feature maps; may be left out: they are the backbone's, and checked against it",
        "各特征图的通道数；可以省略，由骨干网络决定，写出时与其核对",
        None,
    )
    scales: list[int] | None = key(
        "input size / size of the feature maps that are used, finest first; may be left out: the backbone's usual ones",
        "所用特征图的输入尺寸 / 特征图尺寸，从细到粗；可以省略，用骨干网络通常的几个",
        None,
        decides="model",
        least=1,
    )
    tile: int | list[int] | None = key(
        "side of the square tiles, or [height, width], that pictures are cut into after the resize, and that the model "
        "takes; null: it takes whole pictures",
        "缩放之后图片切成的正方形小块的边长，或 [高, 宽]，模型的输入是小块；null：输入是整张图片",
        None,
        decides="model",
        least=32,
        most=LARGEST_SIDE,
    )
    tile_overlap: float = key(
        "of neighbouring tiles, as a share of their sides",
        "相邻小块重叠的部分，占边长的比例",
        OVERLAP,
        decides="training",
        least=0,
        most=0.75,
    )
    tiles_per_epoch: int | None = key(
        "of each picture, at random places, where the features of all tiles do not fit the cache (--cache_memory and "
        "others), or `steps` are too few for all; null: always all tiles",
        "所有小块的特征放不下缓存（--cache_memory 等）或 `steps` 不够学完时，每轮从每张图片随机取多少块；"
        "null：总是用全部小块",
        None,
        decides="training",
        least=1,
        most=65536,
    )
    blocks: list[int] | None = key(
        "of a Vision Transformer, in the place of `scales`: after which blocks the features are taken, counted from 0, "
        "rising, a flow for each; may be left out: the backbone's usual one",
        "Vision Transformer 用它代替 `scales`：在哪些块之后取特征，从 0 数，从小到大，每个一条流；可以省略，"
        "用骨干网络通常的一个",
        None,
        decides="model",
        least=0,
    )
    share_subnet: bool = key(
        "whether both couplings of a step have one subnet, as published; False: one each, as in the paper",
        "一步的两个耦合层是否共用一个子网络，同原复现；False：各有一个，同论文",
        True,
        decides="model",
    )
    subnet_gain: float = key(
        "factor on the weights that the subnets' convolutions start with; 0.4 makes them about as small as PyTorch's, "
        "which 20 couplings need: with 1 the values grow from each to the next, and training diverges",
        "子网络卷积初始权重的系数；0.4 时约与 PyTorch 的初始值一样小，20 个耦合层需要这样：为 1 时数值逐层增大，"
        "训练会发散",
        1.0,
        above=0,
        most=10,
    )
    pretrained: Literal["imagenet", "offline"] = key(
        "imagenet: real weights, else the offline start with a warning; offline: the offline start at once",
        "imagenet：真实权重，没有时用离线起点并警告；offline：直接用离线起点",
        "imagenet",
    )
    white_level: int | None = key(
        "value of white in 16-bit pictures, such as 4095 of a 12-bit camera; may be left out: training finds it",
        "16 位图片中白色的值，例如 12 位相机的 4095；可以省略，由训练找出",
        None,
        decides="training",
        least=1,
        most=65535,
    )
    mask_rule: Literal["published", "half", "nonzero"] = key(
        "mask pixels that count after the bilinear resize: published: those that are still 255; half: those from 128; "
        "nonzero: as half, of masks made 255 wherever they are not 0",
        "掩码双线性缩放后哪些像素算缺陷：published：仍为 255 的；half：不小于 128 的；"
        "nonzero：先把不为 0 的值都当作 255，再同 half",
        "published",
        decides="training",
    )
    image_score: Literal["max", "top"] = key(
        "what of its anomaly map is a picture's score: max: the largest value; top: the mean of the largest ones",
        "图片的分数取异常图的什么：max：最大值；top：若干最大值的平均",
        "max",
        decides="training",
    )
    top_share: float = key(
        "of top: how many values, as a share of the area of one input",
        "top 取多少个值：占一个输入面积的比例",
        0.03,
        decides="training",
        above=0,
        most=1,
    )
    threshold_rule: Literal["published", "f1", "quantile"] = key(
        "how decisions are made: published: above 0.8; f1: by the highest F1 on the test set; quantile: by held-out "
        "good pictures; eval.py calibrates the last two",
        "如何判断：published：高于 0.8；f1：测试集上 F1 最高的阈值；quantile：由留出的正常图片定；后两种由 eval.py 定",
        "published",
    )
    min_area: int = key(
        "regions above the pixel threshold of fewer pixels, of the picture as it was given, are not told; 0: all are",
        "高于像素阈值的区域，像素数（按原图计）少于此值的不列出；0：全部列出",
        0,
        least=0,
    )
    seed: int = key("of all that is random", "所有随机数的种子", 0, decides="training", least=0, most=2**63 - 1)
    epochs: int = key(
        "at most, where there are no `steps`; with lr_schedule cosine the learning rate is 0 at the end of the last",
        "没有 `steps` 时最多训练的轮数；lr_schedule 为 cosine 时学习率在最后一轮结束时为 0",
        500,
        least=1,
        most=1_000_000,  # each checkpoint holds the whole history
    )
    steps: int | None = key(
        "how many training takes, in place of `epochs`: it goes over the pictures as often as that needs, the last "
        "time perhaps not over all; null: epochs; -o epochs=N and --epochs N set it to null",
        "训练的步数，代替 `epochs`：图片按需要反复使用，最后一轮可能用不完；null：按轮数；"
        "-o epochs=N 和 --epochs N 把它设为 null",
        None,
        least=1,
        most=1_000_000,
    )
    batch_size: int = key(
        "pictures in a step, over all processes", "每步的图片数，各进程合计", 32, decides="training", least=1
    )
    lr: float = key("learning rate of Adam", "Adam 的学习率", 1e-3, decides="training", above=0)
    lr_schedule: Literal["constant", "cosine"] = key(
        "cosine: rises over the first fortieth of the training and falls to 0 at its end, the last of `steps` or "
        "`epochs`",
        "cosine：在训练的前四十分之一上升，到结束（`steps` 的最后一步或 `epochs` 的最后一轮）降为 0",
        "constant",
        decides="training",
    )
    weight_decay: float = key(
        "L2, added to the gradient after clipping", "L2，在梯度裁剪之后加到梯度上", 1e-5, decides="training", least=0
    )
    clip_norm: float = key("largest norm of the whole gradient", "整个梯度的范数上限", 0.9, decides="training", above=0)
    feature_noise: float = key(
        "standard deviation of noise that training adds to the normalised features; 0: none",
        "训练时加到归一化特征上的噪声的标准差；0：不加",
        0.0,
        decides="training",
        least=0,
    )
    ema_decay: float = key(
        "of a moving average of the weights, which is what is evaluated and stored; 0: none",
        "权重滑动平均的衰减，评估和保存的是这个平均；0：不用",
        0.0,
        decides="resume",
        least=0,
        most=0.9999,
    )
    holdout: float = key(
        "share of the good training pictures that training does not see, for thresholds and selection",
        "训练不看的正常训练图片的比例，用于阈值和选择",
        0.0,
        decides="resume",
        least=0,
        most=0.5,
    )
    eval_interval: int = key(
        "epochs between two evaluations on the test set; -1: never",
        "每隔多少轮在测试集上评估一次；-1：从不",
        1,
        least=-1,
    )
    selection: Literal["test_auroc", "last", "val_likelihood"] = key(
        "best checkpoint: test_auroc: by the test set, as published; last: the last epoch; val_likelihood: by the "
        "held-out pictures",
        "最佳检查点：test_auroc：按测试集，同原复现；last：最后一轮；val_likelihood：按留出的图片",
        "test_auroc",
        decides="resume",
    )
    patience: int = key(
        "epochs without a new best before training stops; with selection last it never does",
        "多少轮没有新的最佳就停止训练；selection 为 last 时不停",
        30,
        least=1,
    )
    selection_weights: SelectionWeights = dataclasses.field(
        default=SelectionWeights(), metadata={"decides": "training"}
    )
    amp: bool = key(
        "True (train.py --amp): mixed precision in training where it is faster",
        "True（train.py --amp）：训练中在更快的地方使用混合精度",
        False,
    )
    log_interval: int = key(
        "iterations between two log lines; the first and the last of an epoch are always logged",
        "每隔多少次迭代写一行日志；每轮的第一次和最后一次总会写",
        1,
        least=1,
    )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model takes, in pixels: whole pictures, or tiles."""
        return self.layout.model_size

    @property
    def layout(self) -> Layout:
        """What is done with a picture on its way through the model; its region of interest is the checkpoint's."""
        whole, tile = (
            (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else None
            for size in (self.input_size, self.tile)
        )
        return Layout(whole, tile, self.tile_overlap, self._score_pixels(math.prod(tile or whole)))

    @property
    def score_pixels(self) -> int:
        """How many of the largest values of an anomaly map the image score is the mean of.

        A share of the area of one input, whatever the map is made of: a small defect on a larger picture has as many.
        """
        return self.layout.score_pixels

    def _score_pixels(self, area: int) -> int:
        return score_pixels(self.top_share, area) if self.image_score == "top" else 1

    @property
    def scoring(self) -> dict[str, Any]:
        """What scores and thresholds of one model depend on, as `thresholds.yaml` and `inference.yml` say it."""
        return {
            "image_score": self.image_score,
            "top_share": self.top_share if self.image_score == "top" else None,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, as in the YAML file."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = (), **options: Any) -> Config:
    """Read a YAML config, apply `key=value` overrides (dotted keys), then command-line options.

    Args:
        path: the YAML file.
        overrides: strings like `lr=0.0005` or `selection_weights.image=1`; values are YAML.
        options: config keys given as command-line options of their own; None means not given.

    Whoever gives epochs in one of the two ways wants these and no budget in steps: `steps` is None then.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, value out of range; epochs and steps are given.
    """
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:  # ValueError: no YAML, or a name that no file can have
        raise UserError(f"config {path}: cannot be read ({error}); give a YAML file with -cfg") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path}: must hold `key: value` lines, see configs/resnet18.yaml")
    given = {key: value for key, value in options.items() if value is not None}
    for override in overrides:
        _override(values, override)
    values.update(given)
    named = given.keys() | {override.partition("=")[0] for override in overrides}
    if "epochs" in named:
        if "steps" in named and values["steps"] is not None:
            raise UserError("epochs and steps: give one of the two, the length of a training is either")
        values["steps"] = None
    return parse_config(values, f"config {path}")


def updated(config: Config, stored: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """The config with those stored settings that it knows in the place of its own, then overrides as in `load_config`.

    Raises:
        UserError: an override is wrong, or does not go together with what is stored; the message begins with `source`.
    """
    values = config.as_dict()
    values.update({key: value for key, value in copy.deepcopy(stored).items() if key in values})
    for override in overrides:
        _override(values, override)
    return parse_config(values, source)


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Check a plain dictionary and turn it into a Config; `source` starts the error message."""
    config = _build(Config, values, source, prefix="")
    for name in ("input_size", "tile"):
        size = getattr(config, name)
        if isinstance(size, list) and len(size) != 2:
            raise UserError(f"{source}: {name} must be a whole number or [height, width], not {size}")
    if config.input_size == ORIGINAL and config.tile is None:
        raise UserError(f"{source}: input_size {ORIGINAL} needs tiles that the model takes; set tile, e.g. to 256")
    if config.selection_weights.image + config.selection_weights.pixel <= 0:
        raise UserError(f"{source}: selection_weights: image and pixel must not both be 0")
    if config.selection == "val_likelihood" and not config.holdout:
        raise UserError(f"{source}: selection val_likelihood needs pictures to measure it on; set holdout, e.g. to 0.1")
    if config.eval_interval == 0:
        raise UserError(f"{source}: eval_interval must be at least 1, or -1 for never, not 0")
    return config


def check_known(values: dict[str, Any], source: str) -> None:
    """Check those keys of a stored configuration that there are; one of another version may lack some or have more.

    Raises:
        UserError: wrong type, value out of range.
    """
    for name, type_, field in _fields(Config):
        if name in values:
            _check(type_, field.metadata, values[name], source, name)


def keys_that_decide(what: str) -> list[str]:
    """Names of the keys that decide it, see `key`."""
    return [name for name, _, field in _fields(Config) if field.metadata["decides"] == what]


def listing(language: str) -> list[tuple[str, ...]]:
    """A row a key, after one of titles: name, type or choices, default (none: it is needed), bounds, meaning.

    Args:
        language: `en` or `zh`.
    """
    return [TITLES[language], *_rows(Config, language)]


def markdown(language: str) -> str:
    """The listing as a table of the documentation."""
    titles, *rows = listing(language)
    names = [(f"`{name}`", *cells) for name, *cells in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, (":--",) * len(titles), *names))


def _rows(cls: type, language: str, prefix: str = "") -> Iterator[tuple[str, ...]]:
    for name, type_, field in _fields(cls):
        if dataclasses.is_dataclass(type_):
            yield from _rows(type_, language, f"{name}.")
            continue
        kinds = _choices(type_)
        default = {dataclasses.MISSING: "", None: "null"}.get(field.default, str(field.default))
        bounds = ", ".join(f"{sign} {field.metadata[b]}" for b, (_, sign, _) in BOUNDS.items() if b in field.metadata)
        names = ", ".join(k.__name__ if type(k) is type else str(k) for k in kinds if k is not types.NoneType)
        yield prefix + name, names, default, bounds, field.metadata[language]


def _fields(cls: type) -> list[tuple[str, Any, dataclasses.Field]]:
    """Name, type and field of each key."""
    hints = typing.get_type_hints(cls)
    return [(field.name, hints[field.name], field) for field in dataclasses.fields(cls)]


def _choices(type_: Any) -> list[Any]:
    """The types that a key may have, and its choices."""
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        return [choice for part in typing.get_args(type_) for choice in _choices(part)]
    return list(typing.get_args(type_)) if typing.get_origin(type_) is Literal else [type_]


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
    fields = _fields(cls)
    names = [name for name, _, _ in fields]
    for name in values:
        if name not in names:
            known = ", ".join(prefix + name for name in names)
            raise UserError(f"{source}: unknown key {prefix}{name}; known keys: {known}")
    arguments = {}
    for name, type_, field in fields:
        if name in values:
            arguments[name] = _check(type_, field.metadata, values[name], source, prefix + name)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{source}: key {prefix}{name} is missing; configs/resnet18.yaml has them all")
    return cls(**arguments)


def _check(type_: Any, bounds: Mapping[str, Any], value: Any, source: str, name: str) -> Any:
    """Return `value` as `type_`, or raise one line that says what the key takes."""

    def refuse(wanted: str) -> UserError:
        return UserError(f"{source}: {name} must be {wanted}, not {value!r}")

    if dataclasses.is_dataclass(type_):
        if not isinstance(value, dict):
            raise refuse("a group of keys")
        return _build(type_, value, source, prefix=f"{name}.")
    origin = typing.get_origin(type_)
    if origin in (types.UnionType, typing.Union):  # of a list, one other, and texts that are taken as they are
        others = _choices(type_)
        if value is None and types.NoneType in others:
            return None
        if isinstance(value, str) and value in others:
            return value
        others = [t for t in others if isinstance(t, type | types.GenericAlias) and t is not types.NoneType]
        chosen = next((t for t in others if (typing.get_origin(t) is list) == isinstance(value, list)), others[0])
        return _check(chosen, bounds, value, source, name)
    if origin is Literal:
        choices = typing.get_args(type_)
        if not isinstance(value, str) or value not in choices:
            raise refuse("one of " + ", ".join(choices))
        return value
    if origin is list:
        (item,) = typing.get_args(type_)
        if not isinstance(value, list):
            raise refuse("a list")
        return [_check(item, bounds, entry, source, f"{name}[{i}]") for i, entry in enumerate(value)]
    if type_ is float:
        value = _number(value)  # YAML reads 1e-3 as text
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", types.NoneType: "a list"}
    if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
        raise refuse(names[type_])
    if type_ is float and not math.isfinite(value):
        raise refuse("a finite number")
    for bound, (words, _, holds) in BOUNDS.items():
        if bound in bounds and not holds(value, bounds[bound]):
            raise refuse(f"{words} {bounds[bound]}")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def main() -> None:
    parser = ArgumentParser(description="List the keys of a config: name, type or choices, default, bounds, meaning.")
    parser.add_argument("--markdown", choices=TITLES, help="as the table of the documentation in this language")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(args.markdown))
        return
    rows = listing("en")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    run_main(main)
