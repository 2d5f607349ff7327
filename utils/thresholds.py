"""Calibrated thresholds: where they come from, and `thresholds.yaml` beside the checkpoint that they belong to.

A picture is an anomaly if its score is above the image threshold, a pixel is marked if the smoothed map is above the
pixel threshold. Three rules:

published: both are 0.8, whatever the scores are; nothing is calibrated.
f1: the thresholds of the highest F1 on the test set, that of pictures half-way between the scores on both sides of it.
    Needs good and defect pictures there; where the defects have no masks the pixel threshold stays the published one.
quantile: from good pictures that training did not use (split conformal prediction, e.g. Lei et al. 2018,
    doi 10.1080/01621459.2017.1307116). Of n such scores the threshold is the k-th smallest, k = ceil((n + 1)(1 - a)):
    a new good picture, one that is like these, scores above it with a probability of at most a, the false-alarm rate.
    The pixel threshold is the same for the maximum of the smoothed map: with a probability of at most a a new good
    picture has any marked pixel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from datasets.mvtec import Category, GroundTruth
from deploy.common.cli import UserError, warn
from deploy.common.decisions import Thresholds
from deploy.common.files import regular_file, sha256, write_text
from deploy.common.imaging import PUBLISHED_RULE, PUBLISHED_THRESHOLD
from deploy.common.plain_yaml import read_yaml
from utils.config import Config
from utils.metrics import f1_score

if TYPE_CHECKING:
    from utils.evaluation import Scores  # imports paddle, which scripts must set up before

CALIBRATED = ("f1", "quantile")
CHANCE = 0.01  # below this probability something else than chance is at work
FALSE_ALARM_RATE = 0.05  # of the rule quantile, where none is asked for
FILE_NAME = "thresholds.yaml"
RULES = (PUBLISHED_RULE, *CALIBRATED)


@dataclass(frozen=True)
class Calibration:
    """Thresholds and the pictures that they come from."""

    thresholds: Thresholds
    folder: Path  # of the pictures
    pictures: int
    defects: int  # of the pictures
    false_alarm_rate: float | None  # that the rule promises at most


def calibrate_f1(
    folder: Path, figures: Mapping[str, float | None], scores: "Scores", truth: GroundTruth
) -> Calibration | None:
    """The rule `f1`, or None and a warning without defect or without good pictures.

    Args:
        folder: of the test pictures.
        figures: of the test set, what `utils.evaluation.measure_all` returns.
        scores, truth: of the test set.
    """
    image, pixel = figures["image_f1_threshold"], figures["pixel_f1_threshold"]
    if image is None:
        warn(
            f"{folder}: no thresholds were calibrated; the threshold rule f1 needs good and defect pictures there "
            "(--threshold_rule quantile needs good training pictures only)"
        )
        return None
    image = _halfway(scores.image, image)
    if pixel is None:
        thresholds = Thresholds(image, PUBLISHED_THRESHOLD, "f1", PUBLISHED_RULE)
    else:
        thresholds = Thresholds(image, pixel, "f1", "f1")
    return Calibration(thresholds, folder, len(truth.labels), int(truth.labels.sum()), None)


def _halfway(scores: np.ndarray, threshold: float) -> float:
    """Between the scores on both sides of a threshold: the same decisions, and rounding elsewhere changes none.

    Where float32 has no number between the two, the lower one: compared with float32 scores, the middle would be the
    upper one.
    """
    below = float(scores[scores <= threshold].max(initial=min(threshold, 0)))
    above = float(scores[scores > threshold].min())
    middle = (below + above) / 2
    return middle if np.float32(middle) < above else below


def calibrate_quantile(folder: Path, held_out: "Scores", rate: float) -> Calibration:
    """The rule `quantile`; with fewer than 1 / rate - 1 pictures a warning says which rate they can promise.

    Args:
        folder: of the held-out pictures.
        held_out: their scores, of one picture at least.
        rate: false alarms among new good pictures, in (0, 1).
    """
    n = len(held_out.image)
    rank = math.ceil((n + 1) * (1 - Fraction(str(rate))))  # exact: 0.05 is 1 / 20
    if rank > n:
        rank, wanted, rate = n, rate, 1 / (n + 1)
        warn(
            f"{folder}: {n} held-out pictures cannot promise a false-alarm rate of {wanted:g}; their largest score is "
            f"the threshold, which promises {rate:.3g}"
        )
    image, pixel = (float(np.sort(s)[rank - 1]) for s in (held_out.image, held_out.pixel.max(axis=(1, 2))))
    return Calibration(Thresholds(image, pixel, "quantile", "quantile"), folder, n, 0, rate)


def held_out_pictures(
    category: Category, checkpoint: Mapping[str, Any], path: Path, wanted_by: str = "the threshold rule quantile"
) -> list[Path]:
    """The good pictures under train/good that the checkpoint at `path` says its training did not use.

    `wanted_by` is what the error names, as something that can be left out.

    Raises:
        UserError: it held none out, or they are not there any more.
    """
    names = checkpoint.get("held_out", [])
    if not names:
        raise UserError(
            f"{path}: {wanted_by} needs good pictures that training did not use, and this one held none out; "
            "train with -cfg configs/auto.yaml or -o holdout=0.1, or do without"
        )
    present = {category.name_of(picture): picture for picture in category.train}
    missing = [name for name in names if name not in present]
    if missing:
        folder = category.good_folders[0].path
        raise UserError(
            f"{folder / missing[0]}: no such picture, but {path} holds it out ({len(missing)} of {len(names)} are "
            "missing); give --data as in its training, or train again"
        )
    return [present[name] for name in names]


def outcome(thresholds: Thresholds, scores: "Scores", truth: GroundTruth) -> dict[str, float | None]:
    """What the thresholds give on a test set: F1s, false alarms among its good pictures, missed defects."""
    anomalies = scores.image > thresholds.image
    pixel_f1 = None if truth.masks is None else f1_score(scores.pixel > thresholds.pixel, truth.masks)
    return {
        "image_f1": f1_score(anomalies, truth.labels),
        "pixel_f1": pixel_f1,
        "good_test_pictures": int((~truth.labels).sum()),
        "false_alarms": int((anomalies & ~truth.labels).sum()),
        "defect_test_pictures": int(truth.labels.sum()),
        "missed_defects": int((~anomalies & truth.labels).sum()),
    }


def alarm_line(decisions: Mapping[str, float | None], rate: float | None) -> str:
    """An `outcome` in a line, for example `false alarms 1 of 18 good (promised 0.10), missed 0 of 20 defects`."""
    promised = "" if rate is None else f" (promised {rate:.2f})" if rate >= 0.01 else f" (promised {rate:.1g})"
    return (
        f"false alarms {decisions['false_alarms']} of {decisions['good_test_pictures']} good{promised}, "
        f"missed {decisions['missed_defects']} of {decisions['defect_test_pictures']} defects"
    )


def broken_promise(decisions: Mapping[str, float | None], rate: float) -> str | None:
    """What to say where an `outcome` has more false alarms than the promised rate and chance explain; None elsewhere.

    Of n good pictures at most a share `rate` scores above the threshold, each independently: k or more of them do with
    a probability of sum over i >= k of C(n, i) rate^i (1 - rate)^(n - i), which chance is given up for below `CHANCE`.
    """
    alarms, good = decisions["false_alarms"], decisions["good_test_pictures"]
    log_terms = (
        math.log(math.comb(good, i)) + i * math.log(rate) + (good - i) * math.log1p(-rate)
        for i in range(alarms, good + 1)
    )
    if not alarms or sum(map(math.exp, log_terms)) >= CHANCE:
        return None
    return (
        f"{alarms} of {good} good test pictures are called anomalies where {rate:.2g} was promised, more than by "
        "chance: the test pictures are not like those of train (another day, light, place or part?); learn from good "
        "pictures of that kind too, or choose the threshold by defects, with --threshold_rule f1"
    )


def write_thresholds(
    checkpoint: Path, epoch: int, config: Config, calibration: Calibration, figures: Mapping[str, float | None]
) -> Path:
    """Write thresholds.yaml beside the checkpoint, bound to it by its SHA-256; return the file's path.

    Args:
        checkpoint: written after this epoch.
        config: that the pictures were scored with.
        figures: the `outcome` of the thresholds.
    """
    content = {
        "rule": calibration.thresholds.rule,
        "image_threshold": calibration.thresholds.image,
        "pixel_rule": calibration.thresholds.pixel_rule,
        "pixel_threshold": calibration.thresholds.pixel,
        **config.scoring,
        "false_alarm_rate": calibration.false_alarm_rate,
        "data": {
            "folder": str(calibration.folder),
            "pictures": calibration.pictures,
            "defects": calibration.defects,
        },
        "figures": dict(figures),
        "checkpoint": checkpoint.name,
        "epoch": epoch,
        "sha256": sha256(checkpoint),
    }
    path = checkpoint.parent / FILE_NAME
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def load_thresholds(checkpoint: Path, config: Config) -> Thresholds | None:
    """The thresholds stored beside a checkpoint; None if there are none, or (with a warning) they are not for it.

    They are for other scores if they belong to another checkpoint, or the config makes image scores in another way.

    Raises:
        UserError: the file is damaged.
    """
    path = checkpoint.parent / FILE_NAME
    try:
        values = read_yaml(regular_file(path))
        thresholds = Thresholds(
            _threshold(values["image_threshold"]),
            _threshold(values["pixel_threshold"]),
            _one_of(CALIBRATED, values["rule"]),
            _one_of(RULES, values["pixel_rule"]),
        )
        scoring = {"image_score": values.get("image_score", "max"), "top_share": values.get("top_share")}  # as of old
        checkpoint_sha256 = values["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, or run eval.py with --threshold_rule") from error
    if checkpoint_sha256 != sha256(checkpoint):
        warn(
            f"{path}: these thresholds belong to another checkpoint than {checkpoint.name} and are not used; "
            f"run eval.py with --threshold_rule {thresholds.rule}, or delete the file"
        )
        return None
    if scoring != config.scoring:
        told, wanted = (" ".join(str(value) for value in of.values() if value) for of in (scoring, config.scoring))
        warn(
            f"{path}: these thresholds are of image_score {told}, not {wanted}, and are not used; "
            f"run eval.py with --threshold_rule {thresholds.rule} and this image_score, or delete the file"
        )
        return None
    return thresholds


def withdraw_thresholds(checkpoint: Path) -> None:
    """Remove the thresholds stored beside a checkpoint, if there are any; the published ones hold then."""
    (checkpoint.parent / FILE_NAME).unlink(missing_ok=True)


def _threshold(value: Any) -> float:
    # Scores are in [0, 1]; the f1 threshold of a score of 0 lies just below 0.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise ValueError(f"a threshold must be a number up to 1, not {value!r}")
    return float(value)


def _one_of(choices: tuple[str, ...], value: Any) -> str:
    if value not in choices:
        raise ValueError(f"a rule must be one of {', '.join(choices)}, not {value!r}")
    return value
