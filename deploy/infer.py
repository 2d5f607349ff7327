"""Score pictures with an exported model: python deploy/infer.py --save_inference_dir ./results/inference
--use_gpu True --image_path images/bottle_good.png

Needs the exported folder, this folder, paddle, numpy, OpenCV, Pillow and PyYAML; no training code.
"""

import argparse
import hashlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the folder above deploy/

from deploy import runtime
from deploy.cli import (
    ArgumentParser,
    UserError,
    add_pictures,
    boolean,
    non_negative_int,
    positive_int,
    report_error,
    run_main,
    warn,
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Score pictures with an exported model.")
    parser.add_argument("-cfg", "--config", help="accepted as before; the exported model carries all it needs")
    parser.add_argument("--save_inference_dir", default="./results/inference", help="exported model (%(default)s)")
    parser.add_argument("--use_gpu", type=boolean, default=False, help="True or False (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures a run (%(default)s)")
    parser.add_argument("--max_batch_size", type=positive_int, default=16, help="limit of batch_size (%(default)s)")
    parser.add_argument("--warmup", type=non_negative_int, default=0, help="runs before the clock starts (%(default)s)")
    parser.add_argument("--benchmark", type=boolean, default=False, help="True: print times, device, memory")
    add_pictures(parser, "the exported model's")
    parser.add_argument("--output_dir", help="write a picture with heat map and mask per input here")
    parser.add_argument("--verbose", action="store_true", help="say what the runtime set-up chose")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.batch_size > args.max_batch_size:
        warn(f"--batch_size {args.batch_size} is larger than --max_batch_size; {args.max_batch_size} is used")
        args.batch_size = args.max_batch_size
    from deploy.imaging import (
        decision_line,
        draw_result,
        drawing_paths,
        list_images,
        preprocess,
        read_rgb,
        write_picture,
    )

    paths = list_images(args.image_path)
    folder = Path(args.save_inference_dir)
    description = read_description(folder)
    height, width = description["input_size"]
    image_threshold = description["image_threshold"] if args.image_threshold is None else args.image_threshold
    pixel_threshold = description["pixel_threshold"] if args.pixel_threshold is None else args.pixel_threshold
    threads = int(runtime.setup(args.verbose)["OMP_NUM_THREADS"])
    model = Model(folder, args.use_gpu, threads)

    import numpy as np

    blank = np.zeros((args.batch_size, 3, height, width), np.float32)
    for _ in range(args.warmup):
        model.run(blank)
    seconds = {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0}
    scored = 0
    drawings = drawing_paths(paths, Path(args.output_dir or "."))
    for start in range(0, len(paths), args.batch_size):
        begun = time.perf_counter()
        pictures = {}
        for path in paths[start : start + args.batch_size]:
            try:
                pictures[path] = read_rgb(path)
            except UserError as error:
                report_error(error)  # the other pictures still count
        if not pictures:
            continue
        batch = np.concatenate(
            [preprocess(p, height, width, description["mean"], description["std"]) for p in pictures.values()]
        )
        read = time.perf_counter()
        _, smoothed, scores = model.run(batch)
        run = time.perf_counter()
        for (path, picture), score, anomaly_map in zip(pictures.items(), scores, smoothed, strict=True):
            prefix = "" if len(paths) == 1 else f"{path}  "
            print(prefix + decision_line(float(score), image_threshold))
            if args.output_dir:
                drawing = draw_result(picture, anomaly_map[0], float(score), image_threshold, pixel_threshold)
                write_picture(drawings[path], drawing)
        seconds["preprocess"] += read - begun
        seconds["inference"] += run - read
        seconds["postprocess"] += time.perf_counter() - run
        scored += len(pictures)
    if args.benchmark and scored:
        print_benchmark(seconds, scored, args.batch_size, model.device)
    return 0 if scored == len(paths) else 2


class Model:
    """The exported program in Paddle Inference."""

    def __init__(self, folder: Path, use_gpu: bool, threads: int) -> None:
        """Load it; `threads` are for the CPU.

        Raises:
            UserError: this Paddle cannot run it.
        """
        import paddle
        from paddle import inference

        config = inference.Config(str(folder / "inference.json"), str(folder / "inference.pdiparams"))
        config.enable_new_ir(True)  # without both of these enable_memory_optim fails on a PIR program
        config.enable_new_executor(True)
        config.enable_memory_optim()
        config.disable_glog_info()
        gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
        if use_gpu and not gpus:
            warn("--use_gpu True: Paddle sees no GPU here; running on the CPU")
        self.device = "gpu" if use_gpu and gpus else "cpu"
        if self.device == "gpu":
            config.enable_use_gpu(256, 0)  # MiB of memory taken at first, card
        else:
            config.disable_gpu()
            config.disable_mkldnn()  # Paddle 3.3.1 crashes the process when the batch size changes with oneDNN on
            config.set_cpu_math_library_num_threads(threads)
        try:
            self._predictor = inference.create_predictor(config)
        except Exception as error:  # Paddle raises its own kinds
            raise UserError(f"{folder}: Paddle {paddle.__version__} cannot load this model ({error})") from error
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])

    def run(self, images: Any) -> list[Any]:
        """(B, 3, H, W) float32 -> anomaly map (B, 1, H, W), smoothed map (B, 1, H, W), image score (B)."""
        self._input.reshape(images.shape)
        self._input.copy_from_cpu(images)
        try:
            self._predictor.run()
        except Exception as error:  # Paddle raises its own kinds
            raise UserError(f"the exported model cannot take pictures {images.shape}; export again") from error
        names = self._predictor.get_output_names()
        return [self._predictor.get_output_handle(name).copy_to_cpu() for name in names]


def read_description(folder: Path) -> dict[str, Any]:
    """`inference.yml`, checked against the parameter file beside it.

    Raises:
        UserError: no exported model there, or its files do not belong together.
    """
    for name in ("inference.yml", "inference.json", "inference.pdiparams"):
        if not (folder / name).is_file():
            raise UserError(f"--save_inference_dir {folder}: {name} is missing; run deploy/export_model.py first")
    try:
        description = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
        checksums = {name: description["sha256"][name] for name in ("inference.json", "inference.pdiparams")}
        description["input_size"] = height, width = [int(side) for side in description["input_size"]]
        if min(height, width) < 1:
            raise ValueError("input_size must be positive")
        for key in ("image_threshold", "pixel_threshold"):
            description[key] = float(description[key])
        for key in ("mean", "std"):
            description[key] = [float(description[key][channel]) for channel in range(3)]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'inference.yml'}: damaged ({error}); export again") from error
    for name, expected in checksums.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise UserError(f"{folder / name}: does not belong to the inference.yml beside it; export again")
    return description


def print_benchmark(seconds: dict[str, float], pictures: int, batch_size: int, device: str) -> None:
    """What TIPC reads after an inference: times a picture, batch, precision, device, memory."""
    milliseconds = {name: 1000 * value / pictures for name, value in seconds.items()}
    print(f"device: {device}, precision: fp32, batch_size: {batch_size}, pictures: {pictures}")
    print(", ".join(f"{name}_time(ms): {value:.3f}" for name, value in milliseconds.items()))
    print(f"total_time(ms): {sum(milliseconds.values()):.3f}, images/sec: {1000 / sum(milliseconds.values()):.2f}")
    print(f"cpu_memory_peak(MB): {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f}")
    if device == "gpu":
        import paddle

        print(f"gpu_memory_peak(MB): {paddle.device.cuda.max_memory_reserved() / 2**20:.1f}")


if __name__ == "__main__":
    run_main(main)
