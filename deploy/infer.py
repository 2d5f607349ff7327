"""Score pictures with an exported model: python deploy/infer.py --save_inference_dir ./results/inference
--use_gpu True --image_path images/bottle_good.png

Needs the exported folder, this folder, `PACKAGES` and one runtime: paddle, or for a model exported with --format onnx
or all ONNX Runtime or OpenVINO. No training code.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the folder above deploy/

from deploy.backends import add_runtime, asked_for, load_exported, model_files
from deploy.common import runtime
from deploy.common.cli import (
    LARGEST_SIDE,
    ArgumentParser,
    UserError,
    add_pictures,
    boolean,
    non_negative_int,
    positive_int,
    printable,
    run_main,
    warn,
)
from deploy.common.files import sha256

EXAMPLE = "images/bottle_bad.png"
PACKAGES = "numpy opencv-python-headless pillow pyyaml"  # beside the runtime


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Score pictures with an exported model.")
    parser.add_argument("-cfg", "--config", help="accepted as before; the exported model carries all it needs")
    parser.add_argument(
        *("--save_inference_dir", "--model_dir"), default="./results/inference", help="exported model (%(default)s)"
    )
    add_runtime(parser)
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures a run (%(default)s)")
    parser.add_argument("--max_batch_size", type=positive_int, default=16, help="limit of batch_size (%(default)s)")
    parser.add_argument("--warmup", type=non_negative_int, default=0, help="runs before the clock starts (%(default)s)")
    parser.add_argument("--benchmark", type=boolean, default=False, help="True: print times, device, memory")
    add_pictures(parser, "the exported model's", image_path=EXAMPLE)
    parser.add_argument("--output_dir", help="write a picture with heat map and mask per input here")
    parser.add_argument("--verbose", action="store_true", help="say what the runtime set-up chose")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.batch_size > args.max_batch_size:
        warn(f"--batch_size {args.batch_size} is larger than --max_batch_size; {args.max_batch_size} is used")
        args.batch_size = args.max_batch_size
    from deploy.common.decisions import Results, Thresholds
    from deploy.common.imaging import PUBLISHED_RULE, PictureReader, drawing_paths, drawn_size, list_images, preprocess

    paths = list_images(*(args.image_path or [EXAMPLE]))
    folder = Path(args.save_inference_dir)
    description = read_description(folder, args.backend)
    height, width = description["input_size"]
    numbers = description["image_threshold"], description["pixel_threshold"]
    stored = Thresholds(*numbers, description["threshold_rule"], description["pixel_threshold_rule"])
    thresholds = stored.or_given(args)
    drawings = drawing_paths(paths, Path(args.output_dir)) if args.output_dir else {}
    results = Results(paths, thresholds, drawings, args.save_json)
    sizes = {len(paths[start : start + args.batch_size]) for start in range(0, len(paths), args.batch_size)}
    # A smaller last batch would want a graph of its own, which a few runs do not make up for; --winograd asks for it.
    worthwhile = len(sizes) == 1 or len(paths) > 20 * args.batch_size or args.winograd
    options = asked_for(args, sizes if worthwhile else ())
    model = load_exported(folder, args.backend, options)

    if stored.rule != PUBLISHED_RULE and None in (args.image_threshold, args.pixel_threshold):
        print(f"thresholds: {thresholds.describe()}; {folder / 'inference.yml'}")

    import numpy as np

    read_picture = PictureReader(description["white_level"])
    blank = np.zeros((max(sizes), 3, height, width), np.float32)
    for _ in range(args.warmup):
        for size in sizes:
            model.run(blank[:size])
    times: list[tuple[float, float, float]] = []  # seconds a picture of each stage, an entry per picture
    with results:
        for start in range(0, len(paths), args.batch_size):
            begun = time.perf_counter()
            inputs, pictures = [], {}  # what the model takes, and what is drawn: full-size pictures may be large
            for path in paths[start : start + args.batch_size]:
                try:
                    picture = read_picture(path)
                except UserError as error:
                    results.fail(path, error)
                    continue
                inputs.append(preprocess(picture, height, width, description["mean"], description["std"]))
                pictures[path] = drawn_size(picture) if drawings else None
            if not inputs:
                continue
            batch = np.concatenate(inputs)
            read = time.perf_counter()
            _, smoothed, scores = model.run(batch)
            run = time.perf_counter()
            for (path, picture), value, anomaly_map in zip(pictures.items(), scores, smoothed, strict=True):
                results.add(path, float(value), anomaly_map[0], picture)
            stages = (read - begun, run - read, time.perf_counter() - run)
            times += [tuple(seconds / len(pictures) for seconds in stages)] * len(pictures)
    if args.benchmark and times:
        print(f"backend: {model.version}, device: {model.device}, precision: {args.precision}, ", end="")
        print(f"batch_size: {args.batch_size}, threads: {options.threads}, pictures: {len(times)}")
        print_benchmark(np.array(times), model.device)
    return 2 if results.errors else 0


def read_description(folder: Path, backend: str = "paddle") -> dict[str, Any]:
    """`inference.yml`, checked against the files beside it that the runtime reads.

    Raises:
        UserError: no exported model there, or its files do not belong together.
    """
    from deploy.common.plain_yaml import read_yaml

    files = model_files(folder, backend)
    for name in ("inference.yml", *files):
        if not (folder / name).is_file():
            kind = "" if backend == "paddle" else " with --format onnx or all"
            raise UserError(f"--save_inference_dir {folder}: {name} is missing; run deploy/export_model.py{kind} first")
    try:
        description = read_yaml(folder / "inference.yml")
        checksums = {name: description["sha256"][name] for name in files}
        description["category"] = str(description["category"])
        description["input_size"] = height, width = [int(side) for side in description["input_size"]]
        if not 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
            raise ValueError(f"input_size must be from 1 to {LARGEST_SIDE}")
        for key, rule in (("image_threshold", "threshold_rule"), ("pixel_threshold", "pixel_threshold_rule")):
            description[key] = float(description[key])
            description[rule] = printable(str(description.get(rule, "not stated")))
        white_level = description.get("white_level")  # exports before it had none
        description["white_level"] = white_level and int(white_level)
        if description["white_level"] is not None and not 1 <= description["white_level"] <= 65535:
            raise ValueError("white_level must be from 1 to 65535")
        description["image_score"] = kind = str(description.get("image_score", "max"))  # that of exports before it
        description["top_share"] = share = float(description["top_share"]) if kind == "top" else None
        if kind not in ("max", "top") or (share is not None and not 0 < share <= 1):
            raise ValueError("image_score must be max, or top with a top_share up to 1")
        for key in ("mean", "std"):
            description[key] = [float(description[key][channel]) for channel in range(3)]
        numbers = [description["image_threshold"], description["pixel_threshold"], *description["mean"]]
        if not all(map(math.isfinite, (*numbers, *description["std"]))) or min(description["std"]) <= 0:
            raise ValueError("a threshold, mean or std is no number that can be used")
    except KeyError as error:
        raise UserError(f"{folder / 'inference.yml'}: has no {error}; export again") from error
    except (OSError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'inference.yml'}: damaged ({error}); export again") from error
    for name, expected in checksums.items():
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: does not belong to the inference.yml beside it; export again")
    return description


def print_benchmark(times: Any, device: str) -> None:
    """What TIPC reads after an inference: times of a picture and memory; times (pictures, stages) in seconds."""
    import numpy as np

    milliseconds = 1000 * times
    stages = {name: milliseconds[:, i] for i, name in enumerate(("preprocess", "inference", "postprocess"))}
    for name, values in {**stages, "total": milliseconds.sum(axis=1)}.items():
        p50, p95 = np.percentile(values, (50, 95))
        print(f"{name}_time(ms): mean {values.mean():.3f}, p50 {p50:.3f}, p95 {p95:.3f}")
    print(f"images/sec: {len(times) / times.sum():.2f}")
    if memory := runtime.peak_memory():
        print(f"cpu_memory_peak(MB): {memory / 2**20:.1f}")
    if device == "gpu" and "paddle" in sys.modules:
        import paddle

        print(f"gpu_memory_peak(MB): {paddle.device.cuda.max_memory_reserved() / 2**20:.1f}")


if __name__ == "__main__":
    run_main(main, PACKAGES, end_at_once=True)
