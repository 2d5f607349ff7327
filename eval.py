"""Evaluate: python eval.py -cfg ./configs/resnet18.yaml --data ./data -cat all --exp_dir exp"""

import argparse
from pathlib import Path
from typing import Any

from datasets.mvtec import list_categories, load_category, load_ground_truth
from deploy.common.cli import UserError, report_error, run_main, share
from utils.config import Config
from utils.options import add_cache, add_category, add_data, common_parser, start
from utils.report import draw_evaluation, print_table, save_maps, write_results
from utils.results import UNSTATED, experiment_folder
from utils.thresholds import (
    FALSE_ALARM_RATE,
    PUBLISHED,
    RULES,
    calibrate_f1,
    calibrate_quantile,
    held_out_pictures,
    outcome,
    write_thresholds,
)


def parse_args() -> argparse.Namespace:
    parser = common_parser("Figures of trained categories, and the thresholds that their decisions use.")
    add_category(parser, "name of a category's folder under --data, or all")
    add_data(parser)
    add_cache(parser)
    parser.add_argument("--is_last", action="store_true", help="the last checkpoint instead of the best one")
    parser.add_argument("--all_metrics", action="store_true", help="print all figures, not only the AUROCs")
    parser.add_argument("--save_maps", action="store_true", help="write what the figures are made of to maps.npz")
    parser.add_argument(
        "--threshold_rule",
        choices=RULES,
        default="f1",
        help="f1: highest F1 on the test set; quantile: from good training pictures held out (%(default)s)",
    )
    parser.add_argument(
        "--false_alarm_rate",
        type=share,
        metavar="RATE",
        help=f"of quantile: the share of good pictures that may be called an anomaly ({FALSE_ALARM_RATE})",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.false_alarm_rate and args.threshold_rule != "quantile":
        raise UserError("--false_alarm_rate: goes with --threshold_rule quantile only")
    config = start(args)

    folder = experiment_folder(args.exp_dir)
    names = list_categories(Path(args.data)) if args.category == "all" else [args.category]
    results: dict[str, dict[str, Any]] = {}
    failed = False
    for name in names:
        try:
            results[name] = evaluate(config, args, name, folder / name)
        except UserError as error:
            report_error(error)  # the other categories still count
            failed = True
    if results:
        print_table(results, args.all_metrics)
        write_results(folder, results)
    return 2 if failed else 0


def evaluate(config: Config, args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Measure one category, calibrate its thresholds, draw its pictures.

    Returns:
        the category's entry in eval.json: its figures and what they were measured on.

    Raises:
        UserError: data or checkpoint are missing or damaged, or the threshold rule wants pictures that are not there.
    """
    from utils.checkpoint import load_model
    from utils.evaluation import Scores, measure_all, score_images
    from utils.features import CacheBudget, FeatureCache

    # ---- everything is read and computed before anything is written
    category = load_category(Path(args.data), name)
    path = folder / ("last.pdparams" if args.is_last else "best.pdparams")
    model, checkpoint = load_model(config, path)
    by_quantile = args.threshold_rule == "quantile"
    held_out = held_out_pictures(category, checkpoint, path) if by_quantile else []
    truth = load_ground_truth(category.test, config.size, config.mask_rule)

    def score(pictures: list[Path]) -> Scores:
        budget = CacheBudget.from_options(args.cache_memory, args.cache_disk, args.cache_device)
        return score_images(model, FeatureCache(model.feature_extractor, pictures, config.size, budget, name))

    paths = [image.path for image in category.test]
    scores = score(paths)
    figures = measure_all(scores, truth)
    if by_quantile:
        calibration = calibrate_quantile(held_out[0].parent, score(held_out), args.false_alarm_rate or FALSE_ALARM_RATE)
    else:
        calibration = calibrate_f1(Path(args.data) / name / "test", figures, scores, truth)
    thresholds = calibration.thresholds if calibration else PUBLISHED
    epoch = int(checkpoint["epoch"])
    trained = checkpoint.get("config", {})
    selection = trained.get("selection", "test_auroc")
    if args.is_last:
        selection = "last" if selection == "last" or epoch == trained.get("epochs", epoch) else "last_by_patience"

    # ---- files
    if args.is_last:
        print(f"{name}: thresholds are stored for best.pdparams only; with --is_last they stay as they are")
    elif calibration:
        file = write_thresholds(path, epoch, calibration, outcome(thresholds, scores, truth))
        print(f"{name}: thresholds {thresholds.describe()}, written to {file}")
    draw_evaluation(folder / "evaluation", paths, scores, truth, figures, thresholds)
    if args.save_maps:
        save_maps(folder / "maps.npz", paths, scores, truth)
    return {
        **figures,
        "selection": selection,
        "checkpoint": str(path),
        "epoch": epoch,
        "backbone": checkpoint.get("backbone") or UNSTATED,
        "images": len(category.test),
        "anomalous_images": int(truth.labels.sum()),
        "images_with_mask": sum(image.mask is not None for image in category.test),
    }


if __name__ == "__main__":
    run_main(main)
