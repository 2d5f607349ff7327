"""Train one category: python train.py -cfg ./configs/resnet18.yaml --data ./data --exp_dir exp -cat bottle"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from deploy.common.cli import UserError, positive_int, run_main
from deploy.common.files import hold_folder, make_folder, write_text, write_whole
from utils.config import Config
from utils.history import EpochRow, best_row, draw_curves, epoch_line, selection_value, waited_for, write_csv
from utils.log import make_logger
from utils.options import add_cache, add_category, add_data, common_parser, start
from utils.results import category_folder, describe_backbone


def parse_args() -> argparse.Namespace:
    parser = common_parser("Train FastFlow on the good pictures of one category.")
    add_category(parser, "name of the category's folder under --data")
    add_data(parser)
    add_cache(parser)
    parser.add_argument("--epochs", type=positive_int, help="at most; instead of the config's")
    parser.add_argument("--batch_size", type=positive_int, help="instead of the config's")
    parser.add_argument(
        "--test_epochs", type=positive_int, help="evaluate every N epochs; instead of the config's eval_interval"
    )
    parser.add_argument("--backbone_weights", metavar="FILE", help="ImageNet weights: .pdparams, .npz or .safetensors")
    parser.add_argument("--amp", action="store_true", help="mixed precision where it is faster; in eval mode float32")
    parser.add_argument(
        "--resume", action="store_true", help="go on from last.pdparams of the same folder, if it is there"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.resume and args.backbone_weights:
        raise UserError(
            "--backbone_weights: the checkpoint that --resume goes on from holds the backbone; leave it out, or name "
            "the file in FASTFLOW_BACKBONE_WEIGHTS, which counts only where there is no checkpoint yet"
        )
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "eval_interval": args.test_epochs}
    config = start(args, **options, amp=args.amp or None)

    import paddle  # this and what imports it: only after start() has set the runtime up
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from datasets.mvtec import hold_out, load_category, load_ground_truth
    from models.fastflow import FastFlow
    from utils import distributed
    from utils.averaging import WeightAverage
    from utils.checkpoint import load_for_resume, published_state, save_checkpoint
    from utils.evaluation import mean_loss, measure_while_training
    from utils.features import CacheBudget, FeatureCache
    from utils.loss_scale import LossScale
    from utils.training import build_optimizer, mixed_precision, train_epoch
    from utils.weights import load_backbone

    distributed.start()
    # ---- data, model, features: what is wrong with them shows here, before anything is written
    category = load_category(Path(args.data), args.category)
    if config.selection == "test_auroc" and not category.test:
        raise UserError(
            f"category {category.name}: has no test pictures, which selection: test_auroc needs; "
            "train with -cfg configs/resnet18_stable.yaml or -o selection=last"
        )
    train_pictures, held_out = hold_out(category.train, config.holdout, config.seed)
    truth = load_ground_truth(category.test, config.size, config.mask_rule)

    paddle.seed(config.seed)
    model = FastFlow(config)
    folder = make_folder(category_folder(args.exp_dir, category.name))
    if distributed.is_first():
        hold_folder(folder)
    dtype, precision = mixed_precision() if config.amp else ("float32", "float32")
    model.train_in(dtype)
    optimizer = build_optimizer(model, config)
    scale = LossScale() if dtype == "float16" else None
    average = WeightAverage(model, config.ema_decay)
    held_out_names = [path.name for path in held_out]
    history: list[EpochRow] = []
    last = folder / "last.pdparams"
    # The first process decides for all: where another has no such file, it must not start while they go on.
    (resumed,) = distributed.from_first(lambda: (args.resume and last.exists(),))
    if resumed:
        checkpoint = load_for_resume(model, optimizer, average, scale, config, held_out_names, last)
        history = checkpoint["history"]
        backbone = checkpoint["backbone"]
    else:
        backbone = load_backbone(model.feature_extractor, config, args.backbone_weights, train_pictures)
    distributed.same_start(model)
    budget = CacheBudget.from_options(args.cache_memory, args.cache_disk, args.cache_device)
    extractor, size = model.feature_extractor, config.size
    train_features = FeatureCache(extractor, train_pictures, size, budget, "training pictures")
    if distributed.is_first():  # which alone evaluates
        test_features = FeatureCache(extractor, [image.path for image in category.test], size, budget, "test pictures")
        held_out_features = FeatureCache(extractor, held_out, size, budget, "held-out pictures")
        if args.verbose:
            print(f"features kept in: {train_features.place} (train), {test_features.place} (test)", file=sys.stderr)

    def evaluate() -> tuple[float | None, float | None, float | None]:
        """Image and pixel AUROC on the test pictures and the loss on the held-out ones, of those there are."""
        val_loss = mean_loss(model, held_out_features) if held_out else None
        return *measure_while_training(model, test_features, truth), val_loss

    # ---- training
    logger = make_logger(folder / "train.log", silent=not distributed.is_first())
    logger.info(
        f"{category.name}  {len(train_pictures)} training, {len(held_out)} held-out and "
        f"{len(category.test)} test pictures"
    )
    logger.info(f"{category.name}  backbone weights: {describe_backbone(backbone)}")
    logger.info(
        f"{category.name}  global batch {config.batch_size} over {distributed.processes()} process(es), "
        f"learning rate {config.lr:g} ({config.lr_schedule})"
    )
    if config.amp:
        logger.info(f"{category.name}  mixed precision: the flows' convolutions compute in {precision}")
    logger.info(f"{category.name}  trainable parameters: {model.trainable_parameters():,}")
    if args.resume and not resumed:
        logger.info(f"{category.name}  no {last} to go on from: starting at epoch 1")
    if resumed and distributed.is_first():
        follow_last(folder, config, history)
    epochs = range(len(history) + 1, config.epochs + 1)
    with logging_redirect_tqdm([logger]), tqdm(epochs, category.name, unit="epoch", disable=None) as bar:
        for epoch in bar:
            if waited_for(history) >= config.patience:
                logger.info(f"{category.name}  no new best for {config.patience} epochs: stop")
                break
            distributed.meet()  # the first process comes later: it also fills more caches and writes the checkpoints
            started = time.perf_counter()
            loss = train_epoch(
                model,
                optimizer,
                train_features,
                config,
                epoch,
                average,
                scale,
                lambda line: logger.info(f"{category.name}  {line}"),
            )
            image = pixel = val_loss = None
            with average.applied():
                if epoch % config.eval_interval == 0 or epoch == config.epochs:
                    image, pixel, val_loss = distributed.from_first(evaluate)
                state = published_state(model)
                extra = {"average": average.state()} if config.ema_decay else {}
            if scale:
                extra["loss_scale"] = scale.state()
            selection = selection_value(config, image, pixel, val_loss)
            seconds = time.perf_counter() - started
            history.append(EpochRow(epoch, loss, optimizer.get_lr(), image, pixel, selection, seconds, val_loss))

            if not distributed.is_first():
                continue
            content = {
                "epoch": epoch,
                "model_state_dict": state,
                "optimizer_state_dict": optimizer.state_dict(),
                "backbone": backbone,
                "config": config.as_dict(),
                "history": [asdict(row) for row in history],
                "held_out": held_out_names,
                **extra,
            }
            save_checkpoint(folder / "last.pdparams", content)
            follow_last(folder, config, history)
            logger.info(f"{category.name}  {epoch_line(history)}")
    if distributed.is_first():
        draw_curves(folder / "curves.png", history, category.name)
    logger.info(f"{category.name}  checkpoints, history.csv and curves.png are in {folder}")


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
