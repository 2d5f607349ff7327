"""Export: python deploy/export_model.py --exp_dir exp --category bottle -cfg configs/resnet18.yaml
--save_inference_dir ./results/inference

Writes `inference.json` (the program), `inference.pdiparams` (its parameters, backbone included) and `inference.yml`
(all else that inference needs). The program takes normalised pictures (B, 3, H, W) float32, any B, and returns the
anomaly map (B, 1, H, W), the smoothed map (B, 1, H, W) and the image score (B).
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository's root

from deploy.cli import UserError, run_main
from deploy.files import make_folder
from deploy.imaging import MEAN, STD
from utils.options import add_category, common_parser, start
from utils.results import experiment_folder
from utils.thresholds import PUBLISHED, load_thresholds


def parse_args() -> argparse.Namespace:
    parser = common_parser("Turn the best checkpoint of a category into an inference model.")
    add_category(parser, "category whose checkpoint is exported")
    parser.add_argument("--save_inference_dir", default="./results/inference", help="written to (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = start(args)

    import paddle

    from models.linear_maps import SMOOTHING_SIGMA
    from utils.checkpoint import load_model

    checkpoint_path = experiment_folder(args.exp_dir) / args.category / "best.pdparams"
    model, checkpoint = load_model(config, checkpoint_path)
    thresholds = load_thresholds(checkpoint_path) or PUBLISHED
    target = make_folder(Path(args.save_inference_dir))
    spec = paddle.static.InputSpec([None, 3, *config.size], "float32", name="images")
    description = {
        "category": args.category,
        "input_size": list(config.size),  # height, width
        "resize": "bilinear",
        "mean": list(MEAN),
        "std": list(STD),
        "smoothing_sigma": SMOOTHING_SIGMA,
        "image_threshold": thresholds.image,
        "pixel_threshold": thresholds.pixel,
        "threshold_rule": thresholds.rule,
        "checkpoint": str(checkpoint_path),
        "epoch": int(checkpoint["epoch"]),
        "backbone": checkpoint.get("backbone"),
        "paddle": paddle.__version__,
    }
    # All files are made aside and then renamed, so that an export that fails leaves the one before as it was.
    aside = Path(tempfile.mkdtemp(dir=target, prefix=".export-"))
    try:
        paddle.jit.save(paddle.jit.to_static(model, input_spec=[spec], full_graph=True), str(aside / "inference"))
        description["sha256"] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(aside.iterdir())
        }
        (aside / "inference.yml").write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
        for file in sorted(aside.iterdir()):
            os.replace(file, target / file.name)
    except OSError as error:
        raise UserError(f"{target}: the export cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"inference model has been saved into {args.save_inference_dir}")


if __name__ == "__main__":
    run_main(main)
