"""Train one category: python train.py -cfg ./configs/resnet18.yaml --data ./data --exp_dir exp -cat bottle"""

import argparse
import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from deploy.common.cli import UserError, interval, positive_int, run_main, warn
from deploy.common.files import hold_folder, make_folder, put_aside, write_text, write_whole
from deploy.common.imaging import PictureReader
from utils.config import Config
from utils.history import EpochRow, best_row, draw_curves, epoch_line, is_evaluated, may_stop, waited_for, write_csv
from utils.log import make_logger, time_bar
from utils.options import add_cache, add_category, add_cuda, add_data, common_parser, prepare
from utils.results import category_folder, describe_backbone, describe_lack, evaluation_line, published_line
from utils.sensitivity import measure_sensitivity, write_sensitivity
from utils.thresholds import FALSE_ALARM_RATE, calibrate_quantile

if TYPE_CHECKING:
    from datasets.mvtec import GroundTruth
    from utils.features import CacheBudget
    from utils.training import Training  # imports paddle, which scripts must set up before


def parse_args() -> argparse.Namespace:
    parser = common_parser("Train FastFlow on the good pictures of one category.")
    add_category(parser, "name of the category's folder under --data")
    add_data(parser)
    add_cache(parser)
    add_cuda(parser)
    parser.add_argument("--epochs", type=positive_int, help="at most; instead of the config's, and of its steps")
    parser.add_argument("--batch_size", type=positive_int, help="instead of the config's")
    parser.add_argument(
        "--test_epochs", type=interval, help="evaluate every N epochs, -1: never; instead of the config's eval_interval"
    )
    parser.add_argument(
        "--backbone_weights",
        metavar="FILE",
        help="ImageNet weights: .pdparams, .npz or .safetensors, or torch's .pth, .pt or .bin",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision where it is faster; in eval mode float32")
    parser.add_argument(
        "--resume", action="store_true", help="go on from last.pdparams of the same folder, if it is there"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "eval_interval": args.test_epochs}
    check_options(args)
    config = prepare(args, **options, amp=args.amp or None)

    import paddle  # this and what imports it: only after prepare() has set the runtime up
    from tqdm.contrib.logging import logging_redirect_tqdm

    from datasets.check import check
    from datasets.mvtec import hold_out, load_category, load_ground_truth
    from models.fastflow import FastFlow
    from utils import distributed
    from utils.checkpoint import save_checkpoint
    from utils.evaluation import Evaluation
    from utils.features import CacheBudget, FeatureCache
    from utils.training import Training
    from utils.weights import load_backbone

    begun = time.monotonic()
    distributed.join()
    # ---- data, model, features: what is wrong with them shows here, before anything is written
    category = load_category(Path(args.data), args.category)
    found: list[str] = []

    def white_level() -> tuple[int | None]:
        report = check(category, config.holdout, config.white_level)
        report.stop_at_errors()
        found.extend(report.lines())
        return (report.white_level,)

    config = replace(config, white_level=distributed.from_first(white_level)[0])
    train_pictures, held_out = hold_out(category.train, config.holdout, config.seed)
    truth = load_ground_truth(category.test, config.size, config.mask_rule)
    check_rules(config, category.name, truth)
    read = PictureReader(config.white_level)
    paddle.seed(config.seed)
    training = Training(FastFlow(config), config, [category.name_of(path) for path in held_out])
    training.learnt_from = category.digest_of(train_pictures)
    extractor = training.model.feature_extractor
    folder = make_folder(category_folder(args.exp_dir, category.name))
    let_go = hold_folder(folder) if distributed.is_first() else None
    last = folder / "last.pdparams"
    # The first process decides for all: where another has no such file, it must not start while they go on.
    (resumed,) = distributed.from_first(lambda: (args.resume and last.exists(),))
    with saying_how_to_go_on(training, folder, resumed):
        if resumed:
            training.resume(last)
        else:
            training.backbone = load_backbone(extractor, config, args.backbone_weights, train_pictures)
        distributed.train_together(training.model)
        budget = CacheBudget.from_options(args.cache_memory, args.cache_disk, args.cache_device)
        features = FeatureCache(extractor, train_pictures, config.size, budget, "training pictures", read)
        evaluate = aside = None
        if distributed.is_first():  # which alone evaluates and writes
            evaluate = Evaluation(training, [image.path for image in category.test], truth, held_out, budget, read)
            if args.verbose:
                print(f"features kept in: {features.place} (train), {evaluate.place} (test)", file=sys.stderr)
            if not resumed and (last.exists() or (folder / "best.pdparams").exists()):
                aside = put_aside(folder, let_go)

        # ---- training
        logger = make_logger(folder / "train.log", silent=not distributed.is_first())

        def say(line: str) -> None:
            logger.info(f"{category.name}  {line}")

        for line in found:
            say(line)
        say(f"{len(train_pictures)} training, {len(held_out)} held-out and {len(category.test)} test pictures")
        last_epoch = training.last_epoch(len(features))
        introduce(training, last_epoch, say)
        if aside:
            say(f"the training that was here is kept in {aside}")
        if args.resume and not resumed:
            say(f"no {last} to go on from: starting at epoch 1")
        if resumed and distributed.is_first():
            follow_last(folder, config, training.history)
        epochs = range(len(training.history) + 1, last_epoch + 1)
        done, total = training.steps(len(features))
        with logging_redirect_tqdm([logger]), time_bar(done, total, at_most=may_stop(config)) as bar:
            for epoch in epochs:
                if waited_for(training.history) >= config.patience:
                    say(f"no new best for {config.patience} epochs: stop")
                    break
                bar.set_description_str(f"{category.name}  epoch {epoch}/{last_epoch}")
                distributed.meet()  # the first process comes later: it also fills more caches, writes the checkpoints
                started = time.perf_counter()
                loss = training.epoch(features, say, bar.update)
                measured = (None, None, None)
                if is_evaluated(epoch, last_epoch, config):
                    measured = distributed.from_first(evaluate)
                    if category.test:
                        logger.info(evaluation_line(*measured[:2]))
                training.record(loss, *measured, time.perf_counter() - started)
                if distributed.is_first():
                    save_checkpoint(last, training.content())
                    follow_last(folder, config, training.history)
                    say(epoch_line(training.history))
        if distributed.is_first():
            draw_curves(folder / "curves.png", training.history, category.name)
        say(f"checkpoints, history.csv and curves.png are in {folder}")
        if distributed.is_first() and held_out:
            foretell(config, folder / "best.pdparams", held_out, budget, read, say)
        conclude(training.history, category.name, args.exp_dir, time.monotonic() - begun, logger.info)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: they do not.
    """
    if args.category == "all":
        raise UserError("-cat all: train.py trains one category; sh train.sh trains all those under the data folder")
    if args.resume and args.backbone_weights:
        raise UserError(
            "--backbone_weights: the checkpoint that --resume goes on from holds the backbone; leave it out, or name "
            "the file in FASTFLOW_BACKBONE_WEIGHTS, which counts only where there is no checkpoint yet"
        )


def check_rules(config: Config, name: str, truth: "GroundTruth") -> None:
    """Refuse rules that this training could not follow.

    Raises:
        UserError: what they need is not there.
    """
    lacking = describe_lack(truth.labels)
    if config.selection == "test_auroc" and config.eval_interval != -1 and lacking:
        raise UserError(
            f"category {name}: {lacking}, which selection: test_auroc needs to choose a checkpoint; "
            "train with -cfg configs/auto.yaml or -o selection=last"
        )
    if config.threshold_rule == "quantile" and not config.holdout:
        raise UserError(
            "threshold_rule quantile needs good pictures that training does not see: -o holdout=0.1, or "
            "-o threshold_rule=published"
        )


def introduce(training: "Training", last_epoch: int, say: Callable[[str], None]) -> None:
    """Say what is trained and how, up to which epoch."""
    from utils import distributed

    config = training.config
    say(f"backbone weights: {describe_backbone(training.backbone)}")
    say(
        f"global batch {config.batch_size} over {distributed.processes()} process(es), "
        f"learning rate {config.lr:g} ({config.lr_schedule})"
    )
    if config.amp:
        say(f"mixed precision: the flows' convolutions compute in {training.precision}")
    say(f"trainable parameters: {training.model.trainable_parameters():,}")
    if config.steps is not None:
        say(f"{config.steps} steps: the training pictures are gone through in {last_epoch} epochs")
    if config.eval_interval == -1:
        say("never evaluated (-1): best.pdparams is the last epoch, and all epochs are trained")
    else:
        rule = f"stops {config.patience} epochs after the best"
        if not may_stop(config):
            rule = f"trains all {last_epoch} epochs"
        say(f"{rule}; press Ctrl-C and go on with --resume")


@contextlib.contextmanager
def saying_how_to_go_on(training: "Training", folder: Path, resumed: bool) -> Iterator[None]:
    """Within it Ctrl-C also draws curves.png of the epochs that are done, and says how to go on.

    Args:
        training: that is interrupted, whose checkpoints are written to `folder`.
        folder: of the category.
        resumed: the training goes on from an earlier one in the folder.

    Raises:
        KeyboardInterrupt: with what to say, in the first of several processes.
    """
    from utils import distributed

    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not distributed.is_first():
            raise
        done = resumed or (bool(training.history) and (folder / "last.pdparams").exists())
        if training.history and done:
            with contextlib.suppress(KeyboardInterrupt, UserError):  # the second Ctrl-C ends it at once
                draw_curves(folder / "curves.png", training.history, folder.name)
        command = command_again(done)
        if distributed.processes() > 1:
            command = "the same command and --resume" if done else "the same command"  # of the launcher, unknown here
        state = f"the epochs so far are in {folder}; go on with" if done else "no epoch is done yet; start again with"
        raise KeyboardInterrupt(state, command) from interrupt


def command_again(resume: bool) -> str:
    """This process's command line as a shell takes it, or the one that resumes it, without --backbone_weights then."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--resume", action="store_true")
    known.add_argument("--backbone_weights")
    words = known.parse_known_args(sys.orig_argv)[1] if resume else sys.orig_argv
    return shlex.join([*words, *["--resume"] * resume])


def foretell(
    config: Config,
    path: Path,
    held_out: Sequence[Path],
    budget: "CacheBudget",
    read: Callable[[Path], np.ndarray],
    say: Callable[[str], None],
) -> None:
    """Say which drawn defects are found on the held-out pictures, at the threshold that they promise by `quantile`.

    Args:
        config: of the training.
        path: its best checkpoint, beside which sensitivity.json and sensitivity.png are written.
        held_out: good pictures that it did not see.
        budget: for their features.
        read: gives a picture, (h, w, 3) uint8 RGB.
        say: takes a line of the log.
    """
    from utils.checkpoint import load_model
    from utils.evaluation import score_images
    from utils.features import FeatureCache

    try:
        model, _ = load_model(config, path)
        features = FeatureCache(model.feature_extractor, held_out, config.size, budget, "held-out pictures", read)
        scores = score_images(model, features)
        calibration = calibrate_quantile(held_out[0].parent, scores, FALSE_ALARM_RATE)
        thresholds, rate = calibration.thresholds, calibration.false_alarm_rate
        measured = measure_sensitivity(model, held_out, scores.image, thresholds, rate, read)
        write_sensitivity(measured, path)
    except UserError as error:  # the training is done, and its result stays what it is
        warn(f"no word of what it can find: {error}")
    else:
        say(measured.content["line"])


def conclude(history: Sequence[EpochRow], name: str, exp_dir: str, seconds: float, log: Callable[[str], None]) -> None:
    """The published last lines: how long it took, where it is, and the AUROCs of the best epoch."""
    best = best_row(history)
    log(f"Training time {timedelta(seconds=int(seconds))}")
    log(f"save:{exp_dir}")
    log(published_line(name, best.pixel_auroc, best.image_auroc, gap=4))
    log(published_line("mean", best.pixel_auroc, best.image_auroc, gap=4, decimals=4))


def follow_last(folder: Path, config: Config, history: Sequence[EpochRow]) -> None:
    """Bring the other files of the folder in line with last.pdparams, whose history this is.

    It is written first; whatever ends the process between the two, --resume goes on from here.

    Raises:
        UserError: a file cannot be written.
    """
    if best_row(history) is history[-1]:
        write_whole(folder / "best.pdparams", lambda name: shutil.copyfile(folder / "last.pdparams", name))
    write_csv(folder / "history.csv", history)
    write_text(folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))


if __name__ == "__main__":
    run_main(main)
