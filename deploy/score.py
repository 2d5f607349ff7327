"""Score many pictures on one machine or many: python deploy/score.py --save_inference_dir ./results/inference
--input PICTURES --output OUT

Needs what deploy/infer.py needs, and requirements-cluster.txt. No training code.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the folder above deploy/

from deploy.backends import add_runtime
from deploy.cluster.connection import cluster, importing, joined, places
from deploy.common.cli import (
    ArgumentParser,
    UserError,
    add_min_area,
    finite_float,
    non_negative_float,
    positive_int,
    run_main,
)
from deploy.description import read_description
from deploy.infer import PACKAGES, detector_options

if TYPE_CHECKING:
    from deploy.cluster.listing import Seen
    from deploy.cluster.parts import Parts

BATCHES = 4  # that an actor takes in hand at a time
EVERY = 1.0, 30.0  # seconds from one progress line to the next on a terminal, and elsewhere


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Score many pictures with an exported model, on one machine or many.")
    parser.add_argument(
        *("--save_inference_dir", "--model_dir"), default="./results/inference", help="exported model (%(default)s)"
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="PICTURES",
        help="a folder, a pattern, or a .parquet or .csv file with a column of paths; also URIs (s3://, gs://, hdfs://)",
    )
    parser.add_argument("--column", default="path", help="of such a file (%(default)s)")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="folder for the results, in Parquet; those in it are kept"
    )
    parser.add_argument(
        "--where",
        type=of_model,
        metavar="model=CHECKSUM",
        help="score what this model has not scored yet, though others have; the first digits will do",
    )
    parser.add_argument(
        "--cluster", type=cluster, default="local", help="local, auto or ray://HOST:10001 (%(default)s: this machine)"
    )
    parser.add_argument("--actors", type=positive_int, help="processes that score (as many as there is room for)")
    parser.add_argument("--cpus", type=positive_int, default=1, help="cores of each (%(default)s)")
    parser.add_argument("--gpus", type=non_negative_float, help="GPUs of each, e.g. 0.25 (with --use_gpu True 1)")
    add_runtime(parser)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="pictures a run (%(default)s)")
    parser.add_argument("--image_threshold", type=finite_float, help="an anomaly is above it (the exported model's)")
    parser.add_argument("--pixel_threshold", type=finite_float, help="regions are above it (the exported model's)")
    add_min_area(parser, "the exported model's")
    args = parser.parse_args()
    args.gpus = float(args.use_gpu) if args.gpus is None else args.gpus
    args.use_gpu = args.gpus > 0
    args.cpu_threads = args.cpu_threads or args.cpus
    return args


def of_model(text: str) -> str:
    """Type of --where: the digits of the checksum."""
    found = re.fullmatch(r"model=([0-9a-f]{8,64})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be model= and 8 or more digits of a checksum, not {text!r}")
    return found[1]


def main() -> int:
    args = parse_args()
    if "://" in args.output:
        raise UserError(f"--output {args.output}: must be a folder of this machine, or one that is mounted")
    with importing("deploy/score.py"):
        from deploy.cluster.listing import Seen, blocks
        from deploy.cluster.parts import Parts
        from deploy.cluster.scoring import checksum

    folder = Path(args.save_inference_dir).absolute()
    read_description(folder, args.backend)
    model = checksum(folder)
    if args.where and not model.startswith(args.where):
        raise UserError(f"--where model={args.where}: the model in {folder} is {model[:16]}")
    parts = Parts(Path(args.output))
    seen = parts.seen(model if args.where else None)
    listed, left = count(blocks(args.input, args.column), Seen(seen.digests))
    print(f"model {model[:16]}: {left} of {listed} pictures to score, the others are in {parts.folder}", flush=True)
    if left:
        score(args, folder, model, (seen.fresh(block) for block in blocks(args.input, args.column)), left, parts)
    return 0


def score(
    args: argparse.Namespace, folder: Path, model: str, fresh: Iterator[Sequence[str]], total: int, parts: "Parts"
) -> None:
    """Score the pictures on the cluster that the options name.

    Args:
        args: the options.
        folder: of the exported model.
        model: its checksum.
        fresh: the paths, in blocks.
        total: how many there are.
        parts: takes the rows.

    Raises:
        UserError: as `deploy.cluster.scoring.score_all`.
        KeyboardInterrupt: with what to say.
    """
    from deploy.cluster.scoring import score_all, starter

    scored = broken = 0
    try:
        # The rows that are left are written before Ray ends, which may end this process where the cluster is gone.
        with joined(args.cluster), parts:
            start = starter(folder, detector_options(args), model, args.cpus, args.gpus)
            room = places(args.cpus, args.gpus)  # for one at least, however many are asked for
            with progress(total) as bar:
                for rows in score_all(start, args.actors or room, model, pieces(fresh, BATCHES * args.batch_size)):
                    parts.add(rows)
                    bar.update(len(rows))
                    broken += sum("error" in row for row in rows)
                    scored += len(rows)
                seconds = bar.format_dict["elapsed"]
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"{scored} more pictures are in {parts.folder}; the same command goes on"
        ) from interrupt
    print(f"{scored} pictures in {seconds:.0f} s, {scored / seconds:.3g} a second; {broken} of them have an error")


def count(blocks: Iterator[list[str]], seen: "Seen") -> tuple[int, int]:
    """How many paths there are, and how many of them are not seen yet."""
    listed = left = 0
    for block in blocks:
        listed += len(block)
        left += len(seen.fresh(block))
    return listed, left


def pieces(blocks: Iterator[list[str]], size: int) -> Iterator[Sequence[str]]:
    """What actors take in hand: up to so many paths of a block."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def progress(total: int) -> Any:
    """A bar that tells pictures a second and the time that is left."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    form = "{n_fmt}/{total_fmt} pictures, {rate_noinv_fmt}, {remaining} left"
    return tqdm(total=total, bar_format=form, unit=" pictures", mininterval=EVERY[not terminal], smoothing=0.1)


if __name__ == "__main__":
    run_main(main, PACKAGES)
