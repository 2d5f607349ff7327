"""Train the weights of the offline start: python -m models.offline_weights [--resume]"""

import argparse
import time
from pathlib import Path

from deploy import runtime
from deploy.cli import ArgumentParser, UserError, non_negative_float, non_negative_int, positive_int, run_main
from deploy.files import make_folder
from utils.log import make_logger

LOG_INTERVAL = 25  # steps
SAVE_INTERVAL = 250


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="models.offline_weights",
        description="Train ResNet18 up to layer3 on drawn pictures.",
    )
    parser.add_argument("--steps", type=positive_int, default=4000, help="in all (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="pictures a step (%(default)s)")
    parser.add_argument("--size", type=positive_int, default=64, help="of a picture, a multiple of 16 (%(default)s)")
    parser.add_argument("--lr", type=non_negative_float, default=0.001, help="AdamW's highest (%(default)s)")
    parser.add_argument("--weight_decay", type=non_negative_float, default=0.05, help="of kernels (%(default)s)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of weights and pictures (%(default)s)")
    parser.add_argument("--output", default="results/offline_weights", help="folder to write to (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from state.pdparams of the same folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.size % 16:
        raise UserError(f"--size {args.size}: must be a multiple of 16")
    runtime.setup()
    device = runtime.select_device(args.device)

    from models.offline_weights.training import Settings, Training, save_state, write_weights

    training = Training(Settings(args.steps, args.batch_size, args.size, args.lr, args.weight_decay, args.seed))
    folder = make_folder(Path(args.output))
    state = folder / "state.pdparams"
    if args.resume:
        training.restore(state)
    logger = make_logger(folder / "train.log", silent=False)
    logger.info(f"{training.settings} on {device}, from step {training.step}")
    mark, rows = time.perf_counter(), []
    while training.step < args.steps:
        loss, accuracies = training.advance()
        rows.append([loss, *accuracies])
        last = training.step == args.steps
        if training.step % LOG_INTERVAL == 0 or last:
            loss, *accuracies = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            speed = len(rows) * args.batch_size / (time.perf_counter() - mark)
            textures, outlines = (" ".join(f"{value:.3f}" for value in accuracies[i::2]) for i in (0, 1))
            logger.info(
                f"step {training.step}/{args.steps} - loss {loss:.3f} - textures {textures} - outlines {outlines} "
                f"(accuracy at layers 1 2 3) - {speed:.1f} pictures/s"
            )
            mark, rows = time.perf_counter(), []
        if training.step % SAVE_INTERVAL == 0 or last:
            save_state(training, state)
    write_weights(training.model.backbone, folder / "resnet18.npz")
    logger.info(f"{folder / 'resnet18.npz'} written")


if __name__ == "__main__":
    run_main(main)
