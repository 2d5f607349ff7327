"""Evaluate: python eval.py -cfg ./configs/resnet18.yaml --data ./data -cat all --exp_dir exp"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.mvtec import list_categories, load_category, load_ground_truth
from deploy.common.cli import UserError, add_min_area, report_error, run_main, share, warn
from deploy.common.decisions import PUBLISHED_THRESHOLDS
from deploy.common.imaging import PictureReader
from utils.config import Config
from utils.html_report import write_report
from utils.options import add_cache, add_category, add_cuda, add_data, common_parser, own_overrides, prepare
from utils.report import draw_evaluation, print_results, save_maps, write_results
from utils.results import UNSTATED, describe_lack, evaluation_line, experiment_folder
from utils.sensitivity import load_sensitivity, measure_sensitivity, print_sensitivity, short_form, write_sensitivity
from utils.thresholds import (
    FALSE_ALARM_RATE,
    FILE_NAME,
    PUBLISHED_RULE,
    RULES,
    alarm_line,
    broken_promise,
    calibrate_f1,
    calibrate_quantile,
    held_out_pictures,
    load_thresholds,
    outcome,
    withdraw_thresholds,
    write_thresholds,
)


def parse_args() -> argparse.Namespace:
    description = "Figures of trained categories, and the thresholds that their decisions use."
    parser = common_parser(description, of_checkpoint=True)
    add_category(parser, "name of a category's folder under --data, or all")
    add_data(parser)
    add_cache(parser)
    add_cuda(parser)
    parser.add_argument("--is_last", action="store_true", help="the last checkpoint instead of the best one")
    parser.add_argument("--all_metrics", action="store_true", help="print all figures, not only the AUROCs")
    add_min_area(parser, "the config's")
    parser.add_argument("--save_maps", action="store_true", help="write what the figures are made of to maps.npz")
    parser.add_argument(
        "--sensitivity", action="store_true", help="count which defects, drawn on held-out good pictures, are found"
    )
    parser.add_argument(
        "--threshold_rule",
        choices=RULES,
        help="published: 0.8; f1: highest F1 on the test set; quantile: from held-out good pictures (the config's)",
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
    config = prepare(args)
    folder = experiment_folder(args.exp_dir)
    names = list_categories(Path(args.data)) if args.category == "all" else [args.category]
    results: dict[str, dict[str, Any]] = {}
    failed = False
    for name in names:
        try:
            results[name] = evaluate(config, args, name, folder / name, first=name == names[0])
        except UserError as error:
            report_error(error)  # the other categories still count
            failed = True
    if results:
        write_results(folder, results)
        print_results(results, args.all_metrics)
    return 2 if failed else 0


def evaluate(config: Config, args: argparse.Namespace, name: str, folder: Path, first: bool) -> dict[str, Any]:
    """Measure one category, calibrate its thresholds, draw its pictures; `first` of those that are evaluated.

    Returns:
        the category's entry in eval.json: its figures, what they were measured on, and what its decisions come to.

    Raises:
        UserError: data or checkpoint are missing or damaged, or the threshold rule wants pictures that are not there.
    """
    from utils.checkpoint import epoch_of, load_model, selection_of, white_level_of
    from utils.evaluation import Scores, measure_all, measure_defects, measure_regions, score_images
    from utils.features import CacheBudget, FeatureCache

    # ---- everything is read and computed before anything is written
    category = load_category(Path(args.data), name)
    path = folder / ("last.pdparams" if args.is_last else "best.pdparams")
    model, checkpoint = load_model(config, path, own_overrides(args))
    config = model.config
    rule = args.threshold_rule or config.threshold_rule
    if args.false_alarm_rate and rule != "quantile":
        raise UserError(f"--false_alarm_rate: goes with --threshold_rule quantile, and the rule of {name} is {rule}")
    held_out = []
    if rule == "quantile" or args.sensitivity:
        wanted_by = "the threshold rule quantile" if rule == "quantile" else "--sensitivity"
        held_out = held_out_pictures(category, checkpoint, path, wanted_by)
    kept = load_thresholds(path, config) if rule == PUBLISHED_RULE and not args.threshold_rule else None
    truth = load_ground_truth(category.test, config.size, config.mask_rule)
    if first:
        print(f"Model A.D. Param#: {model.trainable_parameters()}")

    read = PictureReader(white_level_of(checkpoint, config))

    def score(pictures: list[Path]) -> Scores:
        budget = CacheBudget.from_options(args.cache_memory, args.cache_disk, args.cache_device)
        return score_images(model, FeatureCache(model.feature_extractor, pictures, config.size, budget, name, read))

    paths = [image.path for image in category.test]
    scores = score(paths)
    figures = measure_all(scores, truth)
    calibration = None
    unseen = score(held_out)
    if rule == "quantile":
        calibration = calibrate_quantile(
            category.good_folders[0].path, unseen, args.false_alarm_rate or FALSE_ALARM_RATE
        )
    elif rule == "f1":
        calibration = calibrate_f1(Path(args.data) / name / "test", figures, scores, truth)
    thresholds = calibration.thresholds if calibration else PUBLISHED_THRESHOLDS
    decisions = outcome(thresholds, scores, truth)
    rate = calibration and calibration.false_alarm_rate
    defects = measure_defects(scores, truth, category.test, config, thresholds.image)
    stored = kept or thresholds  # what predict.py and export go on with
    measured = measure_sensitivity(model, held_out, unseen.image, stored, rate, read) if args.sensitivity else None
    min_area = config.min_area if args.min_area is None else args.min_area
    regions = measure_regions(scores, truth, category.test, replace(thresholds, min_area=min_area))

    # ---- files
    print(evaluation_line(figures["image_auroc"], figures["pixel_auroc"]))
    if lacking := describe_lack(truth.labels):
        warn(f"{name}: {lacking}, so there is no AUROC")
    elif truth.masks is None:
        warn(f"{name}: has defects without masks under ground_truth, so there are no pixel figures")
    if paths:
        print(f"{name}: {alarm_line(decisions, rate)}")
    as_folders_say = all(label or not image.defect for image, label in zip(category.test, truth.labels, strict=True))
    if rate and as_folders_say and (broken := broken_promise(decisions, rate)):
        warn(f"{name}: {broken}")
    if args.is_last:
        if rule != PUBLISHED_RULE:
            print(f"{name}: thresholds are stored for best.pdparams only; with --is_last they stay as they are")
    elif calibration:
        file = write_thresholds(path, epoch_of(checkpoint), config, calibration, decisions)
        print(f"{name}: thresholds {thresholds.describe()}, written to {file}")
    elif kept:
        print(
            f"{name}: predict.py and export go on with {kept.describe()} of {folder / FILE_NAME}; "
            "eval.py --threshold_rule published removes it"
        )
    elif args.threshold_rule == PUBLISHED_RULE:
        withdraw_thresholds(path)
    draw_evaluation(folder / "evaluation", paths, scores, truth, figures, stored, read)
    if args.save_maps:
        save_maps(folder / "maps.npz", paths, scores, truth)
    if measured:
        write_sensitivity(measured, path)
        print_sensitivity(name, measured.content)
    sensitivity = load_sensitivity(path, stored.image)  # that train.py measured, perhaps
    row = {
        **figures,
        "selection": selection_of(checkpoint, args.is_last),
        "checkpoint": str(path),
        "epoch": epoch_of(checkpoint),
        "epoch_in_file": int(checkpoint["epoch"]),
        "backbone": checkpoint.get("backbone") or UNSTATED,
        **config.scoring,
        "images": len(category.test),
        "anomalous_images": int(truth.labels.sum()),
        "images_with_mask": sum(bool(image.masks) for image in category.test),
        "decisions": {
            "rule": thresholds.rule,
            "image": thresholds.image,
            "pixel": thresholds.pixel,
            "false_alarm_rate": rate,
            **decisions,
        },
        "defects": defects,
        "regions": regions and {"min_area": min_area, **regions},
        "sensitivity": sensitivity and short_form(sensitivity),
    }
    decided = {"false_alarm_rate": rate, **outcome(stored, scores, truth)}
    write_report(folder, row, category, checkpoint, config.as_dict(), scores, truth, stored, decided, sensitivity, read)
    return row


if __name__ == "__main__":
    run_main(main)
