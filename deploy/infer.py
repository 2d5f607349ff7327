"""Score pictures with an exported model: python deploy/infer.py --save_inference_dir ./results/inference
--use_gpu True --image_path images/bottle_good.png

Needs the exported folder, this folder, `PACKAGES` and one runtime: paddle, or for a model exported with --format onnx
or all ONNX Runtime or OpenVINO. No training code.
"""

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the folder above deploy/

from deploy.backends import add_runtime
from deploy.common import runtime
from deploy.common.cli import (
    ArgumentParser,
    UserError,
    add_pictures,
    boolean,
    non_negative_int,
    positive_int,
    run_main,
    warn,
)

if TYPE_CHECKING:
    from deploy.common.decisions import Results
    from deploy.detector import Detector

EXAMPLE = "images/bottle_bad.png"
PACKAGES = "numpy opencv-python-headless pillow pyyaml"  # beside the runtime


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Score pictures with an exported model.")
    parser.add_argument("-cfg", "--config", help="accepted as before; the exported model carries all it needs")
    parser.add_argument(
        *("--save_inference_dir", "--model_dir"), default="./results/inference", help="exported model (%(default)s)"
    )
    add_runtime(parser)
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures or tiles a run (%(default)s)")
    parser.add_argument("--max_batch_size", type=positive_int, default=16, help="limit of batch_size (%(default)s)")
    parser.add_argument("--warmup", type=non_negative_int, default=0, help="runs before the clock starts (%(default)s)")
    parser.add_argument("--benchmark", type=boolean, default=False, help="True: print times, device, memory")
    add_pictures(parser, "the exported model's", image_path=EXAMPLE)
    parser.add_argument(
        "--watch",
        metavar="FOLDER",
        help="score each picture of this folder and each that comes, a line of JSON each (on stdout, or added to "
        "--save_json, whose pictures are done already); until Ctrl-C",
    )
    parser.add_argument("--output_dir", help="write a picture with heat map and mask per input here")
    parser.add_argument("--verbose", action="store_true", help="say what the runtime set-up chose")
    args = parser.parse_args()
    if not args.output_dir and (args.save_maps or args.save_masks):
        parser.error("--save_maps and --save_masks: need --output_dir, under which they are written")
    if args.watch and (args.image_path or args.benchmark):
        parser.error("--watch: goes without --image_path and --benchmark")
    return args


def main() -> int:
    args = parse_args()
    if args.batch_size > args.max_batch_size:
        warn(f"--batch_size {args.batch_size} is larger than --max_batch_size; {args.max_batch_size} is used")
        args.batch_size = args.max_batch_size
    return watch(args) if args.watch else score(args)


def score(args: argparse.Namespace) -> int:
    """Score the pictures that are there; the exit code."""
    from deploy.common.decisions import Results, places_of
    from deploy.common.imaging import list_images

    paths = list_images(*(args.image_path or [EXAMPLE]))
    sizes = {len(paths[start : start + args.batch_size]) for start in range(0, len(paths), args.batch_size)}
    # A smaller last batch would want a graph of its own, which a few runs do not make up for; --winograd asks for it.
    worthwhile = len(sizes) == 1 or len(paths) > 20 * args.batch_size or args.winograd
    times: list[tuple[float, float, float]] = []  # seconds a picture of each stage, an entry per picture
    with load(args, sizes if worthwhile else ()) as detector:  # first: without a model no folder is made
        places = {}
        if args.output_dir:
            places = places_of(paths, Path(args.output_dir), args.save_maps, args.save_masks)
        results = Results(paths, places, args.save_json)
        warm_up(detector, args.warmup, sizes)
        with results:
            for start in range(0, len(paths), detector.pictures_at_once):
                batch = paths[start : start + detector.pictures_at_once]
                times += score_together(detector, batch, results, drawable=bool(places))
        if args.benchmark and times:
            print(f"backend: {detector.version}, device: {detector.device}, precision: {args.precision}, ", end="")
            print(f"batch_size: {args.batch_size}, threads: {detector.options.threads}, pictures: {len(times)}")
            print_benchmark(times, detector.device)
    return 2 if results.errors else 0


def score_together(
    detector: "Detector", paths: Sequence[Path], results: "Results", drawable: bool
) -> list[tuple[float, float, float]]:
    """Score a few pictures and tell their results; nothing of them is held afterwards.

    Returns:
        of each one that could be read the seconds that reading, the run and telling took.
    """
    begun = time.perf_counter()
    batch = []
    for path in paths:
        try:
            batch.append(detector.prepare(path, drawable))
        except UserError as error:
            results.fail(path, error)
    read = time.perf_counter()
    decided = detector.decide(batch)
    run = time.perf_counter()
    for prepared, result in zip(batch, decided, strict=True):
        results.add(prepared.path, result)
    stages = (read - begun, run - read, time.perf_counter() - run)
    return [tuple(seconds / len(batch) for seconds in stages)] * len(batch)


def watch(args: argparse.Namespace) -> int:
    """Score the pictures of a folder as they come, until Ctrl-C; the exit code."""
    from deploy.watch import FolderWatch

    folder = FolderWatch(Path(args.watch), args.save_json, args.output_dir, args.save_maps, args.save_masks)
    with load(args, {1, args.batch_size}) as detector:
        warm_up(detector, args.warmup, {1, args.batch_size})
        folder.follow(detector)
    return 0


def load(args: argparse.Namespace, usual_batches: Collection[int]) -> "Detector":
    """The exported model that the options name, with what they say of its decisions."""
    from deploy.common.imaging import PUBLISHED_RULE
    from deploy.detector import Detector

    options = detector_options(args)
    detector = Detector(args.save_inference_dir, **options, usual_batches=usual_batches, verbose=args.verbose)
    detector.thresholds.warn_where_nothing_is_above()
    if detector.stored.rule != PUBLISHED_RULE and None in (args.image_threshold, args.pixel_threshold):
        file = sys.stderr if args.watch else sys.stdout  # where lines of JSON are told, nothing else is
        print(f"thresholds: {detector.thresholds.describe()}; {detector.folder / 'inference.yml'}", file=file)
    return detector


def detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the `Detector` that the command line names, but for what belongs to one process."""
    names = ("backend", "batch_size", "image_threshold", "pixel_threshold", "min_area", "precision", "cpu_threads")
    names += ("use_gpu", "use_mkldnn", "use_tensorrt", "winograd")
    return {name: getattr(args, name) for name in names}


def warm_up(detector: "Detector", runs: int, sizes: Collection[int]) -> None:
    """Run the model so many times on batches of each of these sizes; of tiles there are as many as run together."""
    import numpy as np

    for size in runs * ([detector.batch_size] if detector.layout.tile else list(sizes)):
        detector.run(np.zeros((size, 3, *detector.layout.model_size), np.float32))


def print_benchmark(times: Any, device: str) -> None:
    """What TIPC reads after an inference: times of a picture and memory; times (pictures, stages) in seconds."""
    import numpy as np

    milliseconds = 1000 * np.array(times)
    stages = {name: milliseconds[:, i] for i, name in enumerate(("preprocess", "inference", "postprocess"))}
    for name, values in {**stages, "total": milliseconds.sum(axis=1)}.items():
        p50, p95 = np.percentile(values, (50, 95))
        print(f"{name}_time(ms): mean {values.mean():.3f}, p50 {p50:.3f}, p95 {p95:.3f}")
    print(f"images/sec: {1000 * len(times) / milliseconds.sum():.2f}")
    if memory := runtime.peak_memory():
        print(f"cpu_memory_peak(MB): {memory / 2**20:.1f}")
    if device == "gpu" and "paddle" in sys.modules:
        import paddle

        print(f"gpu_memory_peak(MB): {paddle.device.cuda.max_memory_reserved() / 2**20:.1f}")


if __name__ == "__main__":
    run_main(main, PACKAGES, end_at_once=True)
