"""Evaluate: python eval.py -cfg ./configs/resnet18.yaml --data ./data -cat all --exp_dir exp"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.mvtec import Category, GroundTruth, list_categories, load_category, load_ground_truth
from deploy.common.cli import UserError, add_min_area, report_error, run_main, share, warn
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Thresholds
from deploy.common.imaging import PictureReader
from deploy.common.tiles import Layout, kept_part
from utils.config import Config
from utils.html_report import Evaluated, write_report
from utils.options import add_cache, add_category, add_cuda, add_data, common_parser, own_overrides, prepare
from utils.report import draw_evaluation, print_results, save_maps, write_results
from utils.results import UNSTATED, describe_lack, evaluation_line, experiment_folder
from utils.sensitivity import (
    Sensitivity,
    load_sensitivity,
    measure_sensitivity,
    print_sensitivity,
    short_form,
    write_sensitivity,
)
from utils.thresholds import (
    FALSE_ALARM_RATE,
    FILE_NAME,
    PUBLISHED_RULE,
    RULES,
    Calibration,
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

if TYPE_CHECKING:
    from models.fastflow import FastFlow  # these import paddle, which scripts must set up before
    from utils.evaluation import Scores


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


@dataclass(frozen=True)
class Subject:
    """A category and the model that is evaluated on it."""

    category: Category
    truth: GroundTruth  # of its test pictures
    held_out: list[Path]  # good pictures that the training did not see, where they are asked for
    read: PictureReader
    path: Path  # of the checkpoint
    checkpoint: dict[str, Any]
    model: "FastFlow"
    layout: Layout  # what is done with a picture on its way through the model
    rule: str  # of the thresholds
    kept: Thresholds | None  # that were stored before, and stay

    @property
    def name(self) -> str:
        """Of the category."""
        return self.category.name

    @property
    def config(self) -> Config:
        """Of the model."""
        return self.model.config


@dataclass(frozen=True)
class Findings:
    """What an evaluation has come to."""

    scores: "Scores"  # of the test pictures
    figures: dict[str, float | None]
    calibration: Calibration | None
    thresholds: Thresholds  # of the rule
    decisions: dict[str, float | None]  # their outcome
    stored: Thresholds  # what predict.py and export go on with
    sensitivity: Sensitivity | None

    @property
    def rate(self) -> float | None:
        """Of false alarms, that the thresholds promise."""
        return self.calibration and self.calibration.false_alarm_rate


def evaluate(config: Config, args: argparse.Namespace, name: str, folder: Path, first: bool) -> dict[str, Any]:
    """Measure one category, calibrate its thresholds, draw its pictures; `first` of those that are evaluated.

    Returns:
        the category's entry in eval.json: its figures, what they were measured on, and what its decisions come to.

    Raises:
        UserError: data or checkpoint are missing or damaged, or the threshold rule wants pictures that are not there.
    """
    # Everything is read and computed before anything is written.
    subject = look_up(config, args, name, folder)
    if first:
        print(f"Model A.D. Param#: {subject.model.trainable_parameters()}")
    found = measure(subject, args)
    row = entry(subject, found, args)

    tell(subject, found)
    keep_thresholds(subject, found, args)
    paths = [image.path for image in subject.category.test]
    scores, truth, stored = found.scores, subject.truth, found.stored
    draw_evaluation(folder / "evaluation", paths, scores, truth, found.figures, stored, subject.read)
    if args.save_maps:
        save_maps(folder / "maps.npz", paths, scores, truth)
    if found.sensitivity:
        write_sensitivity(found.sensitivity, subject.path)
        print_sensitivity(name, found.sensitivity.content)
    sensitivity = load_sensitivity(subject.path, stored.image)  # that train.py measured, perhaps
    row["sensitivity"] = sensitivity and short_form(sensitivity)
    decided = outcome(subject.kept, scores, truth) if subject.kept else found.decisions
    write_report(
        Evaluated(
            folder=folder,
            row=row,
            category=subject.category,
            checkpoint=subject.checkpoint,
            config=subject.config,
            scores=scores,
            truth=truth,
            thresholds=stored,
            decisions={"false_alarm_rate": found.rate, **decided},
            sensitivity=sensitivity,
            read=subject.read,
        )
    )
    return row


def look_up(config: Config, args: argparse.Namespace, name: str, folder: Path) -> Subject:
    """Read what is evaluated.

    Raises:
        UserError: data or checkpoint are missing or damaged, or the options do not fit them.
    """
    from utils.checkpoint import layout_of, load_model, white_level_of
    from utils.features import map_size

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
    layout = layout_of(checkpoint, config, path)
    size = map_size(layout, [image.path for image in category.test])
    truth = load_ground_truth(category.test, size, config.mask_rule, kept_part(layout.roi, size))
    read = PictureReader(white_level_of(checkpoint, config))
    return Subject(category, truth, held_out, read, path, checkpoint, model, layout, rule, kept)


def measure(subject: Subject, args: argparse.Namespace) -> Findings:
    """Score the pictures and calibrate the thresholds.

    Raises:
        UserError: a picture cannot be read, or the model is broken.
    """
    from utils.evaluation import Scores, measure_all, score_images
    from utils.features import CacheBudget, FeatureCache

    category, model, truth, read = subject.category, subject.model, subject.truth, subject.read
    layout = subject.layout

    def score(pictures: list[Path]) -> Scores:
        budget = CacheBudget.from_options(args.cache_memory, args.cache_disk, args.cache_device)
        return score_images(model, FeatureCache(model.feature_extractor, pictures, layout, budget, category.name, read))

    scores = score([image.path for image in category.test])
    figures = measure_all(scores, truth)
    unseen = score(subject.held_out) if subject.held_out else None
    calibration = None
    if subject.rule == "quantile":
        rate = args.false_alarm_rate or FALSE_ALARM_RATE
        calibration = calibrate_quantile(category.good_folders[0].path, unseen, rate)
    elif subject.rule == "f1":
        calibration = calibrate_f1(Path(args.data) / category.name / "test", figures, scores, truth)
    thresholds = calibration.thresholds if calibration else PUBLISHED_THRESHOLDS
    stored = subject.kept or thresholds
    sensitivity = None
    if args.sensitivity:
        rate = calibration and calibration.false_alarm_rate
        sensitivity = measure_sensitivity(model, layout, subject.held_out, unseen.image, stored, rate, read)
    decisions = outcome(thresholds, scores, truth)
    return Findings(scores, figures, calibration, thresholds, decisions, stored, sensitivity)


def tell(subject: Subject, found: Findings) -> None:
    """Print the AUROCs and the false alarms, and why there are none."""
    name, truth = subject.name, subject.truth
    print(evaluation_line(found.figures["image_auroc"], found.figures["pixel_auroc"]))
    if lacking := describe_lack(truth.labels):
        warn(f"{name}: {lacking}, so there is no AUROC")
    elif truth.masks is None:
        warn(f"{name}: has defects without masks under ground_truth, so there are no pixel figures")
    test = subject.category.test
    if test:
        print(f"{name}: {alarm_line(found.decisions, found.rate)}")
    as_folders_say = all(label or not image.defect for image, label in zip(test, truth.labels, strict=True))
    if found.rate and as_folders_say and (broken := broken_promise(found.decisions, found.rate)):
        warn(f"{name}: {broken}")


def keep_thresholds(subject: Subject, found: Findings, args: argparse.Namespace) -> None:
    """Store the thresholds beside the checkpoint, or say what is stored there.

    Raises:
        UserError: they cannot be written.
    """
    from utils.checkpoint import epoch_of

    name, path = subject.name, subject.path
    if args.is_last:
        if subject.rule != PUBLISHED_RULE:
            print(f"{name}: thresholds are stored for best.pdparams only; with --is_last they stay as they are")
    elif found.calibration:
        epoch = epoch_of(subject.checkpoint)
        file = write_thresholds(path, epoch, subject.config, found.calibration, found.decisions)
        print(f"{name}: thresholds {found.thresholds.describe()}, written to {file}")
    elif subject.kept:
        print(
            f"{name}: predict.py and export go on with {subject.kept.describe()} of {path.parent / FILE_NAME}; "
            "eval.py --threshold_rule published removes it"
        )
    elif args.threshold_rule == PUBLISHED_RULE:
        withdraw_thresholds(path)


def entry(subject: Subject, found: Findings, args: argparse.Namespace) -> dict[str, Any]:
    """What eval.json says of the category, but for its sensitivity.

    Raises:
        UserError: a mask cannot be read.
    """
    from utils.checkpoint import epoch_of, selection_of
    from utils.evaluation import measure_defects, measure_regions

    test, scores, truth, thresholds = subject.category.test, found.scores, subject.truth, found.thresholds
    checkpoint, config = subject.checkpoint, subject.config
    min_area = config.min_area if args.min_area is None else args.min_area
    regions = measure_regions(scores, truth, test, replace(thresholds, min_area=min_area))
    return {
        **found.figures,
        "selection": selection_of(checkpoint, args.is_last),
        "checkpoint": str(subject.path),
        "epoch": epoch_of(checkpoint),
        "epoch_in_file": int(checkpoint["epoch"]),
        "backbone": checkpoint.get("backbone") or UNSTATED,
        **config.scoring,
        "images": len(test),
        "anomalous_images": int(truth.labels.sum()),
        "images_with_mask": sum(bool(image.masks) for image in test),
        "decisions": {
            "rule": thresholds.rule,
            "image": thresholds.image,
            "pixel": thresholds.pixel,
            "false_alarm_rate": found.rate,
            **found.decisions,
        },
        "defects": measure_defects(scores, truth, test, config, thresholds.image),
        "regions": regions and {"min_area": min_area, **regions},
    }


if __name__ == "__main__":
    run_main(main)
