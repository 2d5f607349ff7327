"""Export: python deploy/export_model.py --exp_dir exp --category bottle -cfg configs/resnet18.yaml
--save_inference_dir ./results/inference --format all

Writes `inference.yml` (all that inference needs beside the program) and, by `--format`:

paddle: Paddle's `inference.json` (the program; Paddle 2.6 writes `inference.pdmodel`) and `inference.pdiparams` (its
    parameters, backbone included);
pdmodel: `inference.pdmodel`, the program in the form that Paddle 2 reads, and `inference.pdiparams`;
onnx: `inference.onnx`, which carries the content of `inference.yml` as its metadata;
all: what paddle and onnx write. A folder holds one program of Paddle's, so pdmodel has an export of its own.

The program takes normalised pictures (B, 3, H, W) float32, any B, and returns the anomaly map (B, 1, H, W), the
smoothed map (B, 1, H, W) and the image score (B). H and W are those of a tile, where the model takes tiles; what is
made of their maps, and of `roi.png`, if there is a region of interest, is not in the program (`deploy.common.tiles`).
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository's root

from deploy.backends import FILES, OLD_PROGRAM, model_files
from deploy.common.cli import DISK_FULL, UserError, run_main
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Thresholds
from deploy.common.files import flush, hold_folder, make_folder, sha256
from deploy.common.imaging import MEAN, PUBLISHED_RULE, STD, png
from deploy.common.tiles import ORIGINAL, ROI_FILE, Layout
from utils.config import Config
from utils.options import add_category, common_parser, own_overrides, prepare
from utils.results import category_folder
from utils.thresholds import FILE_NAME, load_thresholds

if TYPE_CHECKING:
    from paddle import Tensor

    from models.export_form import InferenceForm

OPSET = 13  # of ONNX: the first with all that the program needs in the form that newer ones have too
ADVICE = "make room on its disk and export again"
OUTPUTS = ("anomaly_map", "smoothed_map", "image_score")


def parse_args() -> argparse.Namespace:
    parser = common_parser("Turn the best checkpoint of a category into an inference model.", of_checkpoint=True)
    add_category(parser, "category whose checkpoint is exported")
    parser.add_argument("--save_inference_dir", default="./results/inference", help="written to (%(default)s)")
    parser.add_argument(
        "--format",
        choices=("paddle", "pdmodel", "onnx", "all"),
        default="paddle",
        help=f"of what is written; pdmodel: {OLD_PROGRAM} for Paddle 2, all: paddle and onnx (%(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.format == "pdmodel":
        os.environ["FLAGS_enable_pir_api"] = "0"  # read by Paddle 3 as it is imported: programs of the older form
    config = prepare(args)

    import paddle

    from models.export_form import InferenceForm
    from utils.checkpoint import layout_of, load_model

    versions = {"paddle": paddle.__version__}
    to_onnx = args.format in ("onnx", "all")
    if to_onnx:
        versions |= converter_versions()
    checkpoint_path = category_folder(args.exp_dir, args.category) / "best.pdparams"
    model, checkpoint = load_model(config, checkpoint_path, own_overrides(args))
    layout = layout_of(checkpoint, model.config, checkpoint_path)
    thresholds = load_thresholds(checkpoint_path, model.config) or PUBLISHED_THRESHOLDS
    target = make_folder(Path(args.save_inference_dir))
    description = {
        "category": args.category,
        **describe(model.config, layout, checkpoint, thresholds),
        "checkpoint": str(checkpoint_path),
        "checkpoint_sha256": sha256(checkpoint_path),
        "versions": versions,
    }
    with replaced_together(target) as aside:
        write_program(InferenceForm(model), model.config.size, aside)
        if to_onnx:
            write_onnx(aside, description)
        if args.format == "onnx":
            for name in model_files(aside, "paddle"):
                (aside / name).unlink()
        if layout.roi is not None:
            (aside / ROI_FILE).write_bytes(png(layout.roi, 255))
        description["sha256"] = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        (aside / "inference.yml").write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    if thresholds.rule != PUBLISHED_RULE:
        print(f"thresholds: {thresholds.describe()}; {checkpoint_path.parent / FILE_NAME}")
    print(f"inference model has been saved into {args.save_inference_dir}")


def describe(config: Config, layout: Layout, checkpoint: Mapping[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """What inference.yml says of how pictures are prepared and decided on, and where the weights are from."""
    from utils.checkpoint import epoch_of, white_level_of

    return {
        "input_size": list(layout.input_size) if layout.input_size else ORIGINAL,  # height, width
        "resize": "bilinear",  # of deploy.common.imaging.resize, whatever the shape of the picture
        "mean": list(MEAN),
        "std": list(STD),
        "white_level": white_level_of(checkpoint, config),  # of 16-bit pictures; null: none were learnt from
        "smoothing_sigma": layout.sigma,
        **({"tile": list(layout.tile), "tile_overlap": layout.overlap} if layout.tile else {}),
        **config.scoring,
        "image_threshold": thresholds.image,
        "pixel_threshold": thresholds.pixel,
        "threshold_rule": thresholds.rule,
        "pixel_threshold_rule": thresholds.pixel_rule,
        "min_area": config.min_area,  # of regions, in pixels of the picture
        "epoch": epoch_of(checkpoint),
        "backbone": checkpoint.get("backbone"),
    }


@contextlib.contextmanager
def replaced_together(target: Path) -> Iterator[Path]:
    """Within it an empty folder is there, whose files then take the place of the export in `target`.

    An export that fails leaves the one before as it was. This process holds the folder from then on.

    Raises:
        UserError: another process holds it, or the files cannot be written.
    """
    hold_folder(target)
    aside = target / ".export"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir()
        yield aside
        made = sorted(aside.iterdir())
        for file in made:
            flush(file)
        for file in made:
            os.replace(file, target / file.name)
        known = {ROI_FILE, OLD_PROGRAM, *(name for names in FILES.values() for name in names)}
        for name in known - {file.name for file in made}:
            (target / name).unlink(missing_ok=True)  # of an earlier export in another format
        flush(target)
    except OSError as error:
        advice = f"; {ADVICE}" if error.errno in DISK_FULL else ""
        raise UserError(f"{target}: the export cannot be written ({error.strerror or error}){advice}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_program(form: "InferenceForm", size: tuple[int, int], folder: Path) -> None:
    """Write Paddle's program and its parameters, and read them back: on a full disk Paddle says nothing.

    Raises:
        UserError: not all of it is there, or the program's older form lacks an operator.
    """
    import paddle

    spec = paddle.static.InputSpec([None, 3, *size], "float32", name="images")
    program = paddle.jit.to_static(form, input_spec=[spec], full_graph=True)
    path = folder / "inference"
    try:
        with operators_of_the_older_form():
            paddle.jit.save(program, str(path))
        written = paddle.jit.load(str(path)).state_dict()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder.parent}: Paddle cannot write the model ({reason}); {ADVICE}") from error
    except TypeError as error:
        lacking = re.search(r"(\w+)\(\): .* must be Value, but got Variable", str(error))
        if not lacking:
            raise
        raise UserError(
            f"--format pdmodel: Paddle {paddle.__version__} cannot write {lacking[1]} into a program of the older form"
            "; give --format paddle or onnx"
        ) from error
    # Under other names than ours; where the last array ends too soon, Paddle reads it nevertheless.
    ours = {array_sha256(value) for value in (*form.parameters(), *form.buffers())}
    if not ours.issuperset(map(array_sha256, written.values())):
        raise UserError(f"{folder.parent}: Paddle has not written the whole model; {ADVICE}")
    path.with_suffix(".pdiparams.info").unlink(missing_ok=True)  # of the older form; nothing reads it


@contextlib.contextmanager
def operators_of_the_older_form() -> Iterator[None]:
    """Within it Paddle 3 can write the exp, sigmoid and matmul of a model into programs of the older form.

    FLAGS_enable_pir_api=0 asks Paddle 3 for that form, but the functions of these operators know only PIR in 3.3.
    """
    from paddle import _C_ops
    from paddle.base.layer_helper import LayerHelper
    from paddle.framework import in_dynamic_or_pir_mode

    def add(kind: str, inputs: dict[str, Any], **attributes: bool) -> Any:
        helper = LayerHelper(kind)
        result = helper.create_variable_for_type_inference(inputs["X"].dtype)
        helper.append_op(type=kind, inputs=inputs, outputs={"Out": result}, attrs=attributes)
        return result

    def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
        return add("matmul_v2", {"X": x, "Y": y}, trans_x=transpose_x, trans_y=transpose_y)

    def choose(newer: Callable, older: Callable) -> Callable:
        return lambda *args, **kwargs: (newer if in_dynamic_or_pir_mode() else older)(*args, **kwargs)

    older = {"exp": lambda x: add("exp", {"X": x}), "sigmoid": lambda x: add("sigmoid", {"X": x}), "matmul": matmul}
    newer = {name: getattr(_C_ops, name) for name in older}
    try:
        for name in older:
            setattr(_C_ops, name, choose(newer[name], older[name]))
        yield
    finally:
        for name in newer:
            setattr(_C_ops, name, newer[name])


def converter_versions() -> dict[str, str]:
    """Versions of the packages that make the ONNX model.

    Raises:
        UserError: one of them is missing.
    """
    try:
        return {name: metadata.version(name) for name in ("paddle2onnx", "onnx")}
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"--format: ONNX needs {error.name}; pip install -r requirements-deploy.txt (Python up to 3.12)"
        ) from error


def write_onnx(folder: Path, description: dict[str, Any]) -> None:
    """Convert the Paddle program in this folder to `inference.onnx` beside it, named, checked and described.

    Raises:
        UserError: Paddle2ONNX cannot convert it, or makes no valid ONNX of it.
    """
    import onnx

    program, parameters = model_files(folder, "paddle")
    command = [sys.executable, "-m", "paddle2onnx.command", "--model_dir", str(folder), "--model_filename", program]
    command += ["--params_filename", parameters, "--save_file", str(folder / "inference.onnx")]
    # The optimisers that Paddle2ONNX knows install packages, or are not there; the runtimes optimise for themselves.
    command += ["--opset_version", str(OPSET), "--optimize_tool", "None"]
    # A process of its own: the converter is chatty, and where it fails it may crash.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not (folder / "inference.onnx").is_file():
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"--format: Paddle2ONNX cannot convert this model ({last})")
    try:
        model = onnx.load(folder / "inference.onnx")
    except Exception as error:  # protobuf, which reads it, raises its own kinds
        raise UserError(f"{folder.parent}: Paddle2ONNX has not written the whole model; {ADVICE}") from error
    graph = model.graph
    names = dict(zip((output.name for output in graph.output), OUTPUTS, strict=True))
    for node in graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    for value, name in zip(graph.output, OUTPUTS, strict=True):
        value.name = name
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)
    onnx.helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise UserError(f"--format: Paddle2ONNX made a model that is no valid ONNX ({error})") from error
    onnx.save(model, folder / "inference.onnx")


def array_sha256(value: "Tensor") -> str:
    """Of a tensor's numbers, in hexadecimal."""
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    run_main(main)
