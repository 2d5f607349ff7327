"""Options that train.py, eval.py, predict.py and deploy/export_model.py share."""

import argparse
import sys

from deploy.common import runtime
from deploy.common.cli import ArgumentParser, boolean, non_negative_float, warn
from utils.config import Config, load_config

PUBLISHED_CONFIG = "./configs/resnet18.yaml"


def experiment_parser(description: str, of_checkpoint: bool = False, several: bool = False) -> ArgumentParser:
    """A parser with the options that name an experiment and its configuration.

    Args:
        description: of the script.
        of_checkpoint: without -cfg the script takes what the checkpoint was trained with, see `own_overrides`.
        several: -cfg may be repeated; it is a list then, or None where none is named.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument(
        *("-cfg", "--config"),
        action="append" if several else "store",
        default=None if of_checkpoint or several else PUBLISHED_CONFIG,
        help=f"YAML config ({'the settings that the checkpoint holds, else ' * of_checkpoint}{PUBLISHED_CONFIG})",
    )
    parser.add_argument(
        "-o",
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, e.g. -o lr=0.0005 -o selection_weights.image=1; repeatable",
    )
    parser.add_argument("--exp_dir", default="exp", help="folder under results/ (%(default)s)")
    return parser


def common_parser(description: str, of_checkpoint: bool = False) -> ArgumentParser:
    """A parser with the options that every script takes which uses one model; see `experiment_parser`."""
    parser = experiment_parser(description, of_checkpoint)
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="say what the runtime set-up chose")
    return parser


def add_category(parser: ArgumentParser, help_text: str) -> None:
    """Add -cat/--category."""
    parser.add_argument("-cat", "--category", default="bottle", help=f"{help_text} (%(default)s)")


def add_data(parser: ArgumentParser) -> None:
    """Add --data."""
    parser.add_argument("--data", default="./data", help="folder of the categories (%(default)s)")


def add_cache(parser: ArgumentParser) -> None:
    """Add the limits of the feature cache."""
    places = (
        ("device", "the GPU's memory", "a quarter of it"),
        ("memory", "main memory", "half of what is free"),
        ("disk", "the folder of temporary files", "half of what is free"),
    )
    for name, place, default in places:
        parser.add_argument(
            f"--cache_{name}",
            type=non_negative_float,
            metavar="GIB",
            help=f"most that cached features may take in {place}, 0 for nothing ({default})",
        )


def add_cuda(parser: ArgumentParser) -> None:
    """Add --cuda, the published way to name the device."""
    parser.add_argument("--cuda", type=boolean, help="True: a GPU if there is one, False: the CPU; --device says more")


def prepare(args: argparse.Namespace, **options: object) -> Config:
    """Read the config, the published one if none is named, set up the runtime, import paddle and choose the device.

    `options` are config keys that were given as command-line options; None means not given.
    """
    config = load_config(PUBLISHED_CONFIG if args.config is None else args.config, args.override, **options)
    runtime.import_paddle(args.verbose)
    cuda = getattr(args, "cuda", None)
    device = runtime.select_device("cpu" if cuda is False and args.device == "auto" else args.device)
    if cuda and device == "cpu":
        warn("--cuda True: Paddle sees no GPU here; running on the CPU")
    if args.verbose:
        print(f"device: {device}", file=sys.stderr)
        if device == "cpu":
            from models.cpu import convolutions

            print(convolutions.describe(), file=sys.stderr)
    return config


def own_overrides(args: argparse.Namespace) -> list[str] | None:
    """For `utils.checkpoint.load_model`: where no config is named, what -o changes of the checkpoint's own settings."""
    return args.override if args.config is None else None
