"""Evaluate: python eval.py -cfg ./configs/resnet18.yaml --data ./data -cat all --exp_dir exp"""

import argparse
import json
from pathlib import Path
from typing import Any

from deploy.cli import UserError, report_error, run_main, warn
from deploy.files import write_text
from utils.config import Config
from utils.options import add_category, add_data, common_parser, start
from utils.results import UNSTATED, describe_backbone, experiment_folder, figure


def parse_args() -> argparse.Namespace:
    parser = common_parser("Image and pixel AUROC of trained categories.")
    add_category(parser, "name of a category's folder under --data, or all")
    add_data(parser)
    parser.add_argument("--is_last", action="store_true", help="the last checkpoint instead of the best one")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    config = start(args)

    from datasets.mvtec import list_categories

    folder = experiment_folder(args.exp_dir)
    names = list_categories(Path(args.data)) if args.category == "all" else [args.category]
    results: dict[str, dict[str, Any]] = {}
    failed = False
    for name in names:
        try:
            results[name] = evaluate(config, Path(args.data), name, folder / name, args.is_last)
        except UserError as error:
            report_error(error)  # the other categories still count
            failed = True
    if results:
        print_table(results)
        write_json(folder / "eval.json", results)
    return 2 if failed else 0


def evaluate(config: Config, data: Path, name: str, folder: Path, is_last: bool) -> dict[str, Any]:
    """The figures of one category and what they were measured on.

    Raises:
        UserError: data or checkpoint are missing or damaged.
    """
    from datasets.mvtec import load_category, load_ground_truth
    from utils.checkpoint import load_model
    from utils.evaluation import measure, score_images
    from utils.features import CacheBudget, FeatureCache

    category = load_category(data, name)
    path = folder / ("last.pdparams" if is_last else "best.pdparams")
    model, checkpoint = load_model(config, path)
    truth = load_ground_truth(category.test, config.size, config.mask_rule)
    paths = [image.path for image in category.test]
    features = FeatureCache(model.feature_extractor, paths, config.size, CacheBudget.from_options(None, None), name)
    image, pixel = measure(score_images(model, features), truth)
    return {
        "pixel_auroc": pixel,
        "image_auroc": image,
        "checkpoint": str(path),
        "epoch": int(checkpoint["epoch"]),
        "backbone": checkpoint.get("backbone") or UNSTATED,
        "images": len(category.test),
        "anomalous_images": int(truth.labels.sum()),
        "images_with_mask": sum(image.mask is not None for image in category.test),
    }


def write_json(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write the results with their mean; categories that the file holds already and that were not evaluated stay."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["categories"]
    except FileNotFoundError:
        before = {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{path}: is damaged ({error}) and written anew")
        before = {}
    categories = {**before, **results}
    content = {"mean": means(categories), "categories": categories}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(f"written to {path}")


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """The published table: pixel and image AUROC per category, then the mean."""
    width = max(len(name) for name in [*results, "category"])
    print(f"{'category':<{width}}  pixel auroc  image auroc")
    for name, row in [*results.items(), ("mean", means(results))]:
        print(f"{name:<{width}}  {figure(row['pixel_auroc']):>11}  {figure(row['image_auroc']):>11}")
    for backbone in sorted({describe_backbone(row["backbone"]) for row in results.values()}):
        print(f"backbone weights: {backbone}")


def means(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Both AUROCs averaged over the categories where they could be measured."""
    mean = {}
    for key in ("pixel_auroc", "image_auroc"):
        measured = [row[key] for row in results.values() if row[key] is not None]
        mean[key] = sum(measured) / len(measured) if measured else None
    return mean


if __name__ == "__main__":
    run_main(main)
