"""Scores of a test set and the figures made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paddle
from paddle import Tensor

from datasets.mvtec import GroundTruth, LabelledImage, load_ground_truth
from deploy.common.cli import UserError
from deploy.common.decisions import Thresholds
from deploy.common.imaging import upright_size
from deploy.common.regions import find_regions
from models.fastflow import FastFlow, negative_log_likelihood
from utils.config import Config
from utils.features import CacheBudget, FeatureCache
from utils.metrics import aupro, auroc, average_precision, f1_max
from utils.training import Training

EVALUATION_BATCH = 8  # pictures a pass; the result does not depend on it


@dataclass(frozen=True)
class Scores:
    """image: (N,) float32, the image scores; pixel: (N, H, W) float32, the smoothed maps.

    Without pictures N, H and W are 0.
    """

    image: np.ndarray
    pixel: np.ndarray


def score_images(model: FastFlow, features: FeatureCache) -> Scores:
    """Run the flows in eval mode over cached features.

    Raises:
        UserError: scores are not finite, so the model is broken.
    """
    if not len(features):
        return Scores(np.zeros(0, np.float32), np.zeros((0, 0, 0), np.float32))
    image, pixel = _score_on_device(model, features)
    return Scores(image.numpy(), pixel.numpy())


def measure_while_training(
    model: FastFlow, features: FeatureCache, truth: GroundTruth
) -> tuple[float | None, float | None]:
    """What `measure` gives of `score_images`; on a GPU it is computed there, and no map is copied.

    Raises:
        UserError: as `score_images`.
    """
    if not len(features) or paddle.get_device() == "cpu":
        return measure(score_images(model, features), truth)
    image, pixel = _score_on_device(model, features)
    pixel_auroc = None if truth.masks is None else auroc_on_device(pixel, paddle.to_tensor(truth.masks))
    return auroc_on_device(image, paddle.to_tensor(truth.labels)), pixel_auroc


@paddle.no_grad()
def auroc_on_device(scores: Tensor, labels: Tensor) -> float | None:
    """`utils.metrics.auroc` of tensors, by Paddle's operators, where the tensors are."""
    positives, negatives = paddle.sort(scores[labels]), paddle.sort(scores[paddle.logical_not(labels)])
    if not positives.size or not negatives.size:
        return None
    below, not_above = (paddle.searchsorted(negatives, positives, right=right).sum() for right in (False, True))
    return (below + not_above).item() / (2 * positives.size * negatives.size)


@paddle.no_grad()
def _score_on_device(model: FastFlow, features: FeatureCache) -> tuple[Tensor, Tensor]:
    """Image scores (N,) and smoothed maps (N, H, W), float32."""
    model.eval()
    image, pixel = [], []
    for start in range(0, len(features), EVALUATION_BATCH):
        indices = np.arange(start, min(start + EVALUATION_BATCH, len(features)))
        _, smoothed, scores = model.score(features.batch(indices))
        image.append(scores)
        pixel.append(smoothed[:, 0])
    scores = paddle.concat(image)
    if not paddle.isfinite(scores).all().item():
        raise UserError("the model gives scores that are not numbers; its training diverged (a lower lr helps)")
    return scores, paddle.concat(pixel)


@paddle.no_grad()
def mean_loss(model: FastFlow, features: FeatureCache) -> float:
    """The training loss in eval mode, averaged over the pictures: -log p per dimension, summed over the scales."""
    model.eval()
    total = paddle.zeros([])
    for start in range(0, len(features), EVALUATION_BATCH):
        indices = np.arange(start, min(start + EVALUATION_BATCH, len(features)))
        total += negative_log_likelihood(model.latents(features.batch(indices))) * len(indices)
    return total.item() / len(features)


class Evaluation:
    """What is measured after an epoch, on pictures whose features are kept from one epoch to the next."""

    def __init__(
        self,
        training: Training,
        test: Sequence[Path],
        truth: GroundTruth,
        held_out: Sequence[Path],
        budget: CacheBudget,
        read: Callable[[Path], np.ndarray],
    ) -> None:
        """
        Args:
            training: whose model is measured, with the averaged weights where it has them.
            test: the test pictures, none perhaps.
            truth: of the test pictures.
            held_out: good pictures that the training does not see, none perhaps.
            budget: for the features.
            read: gives a picture, (h, w, 3) uint8 RGB.
        """
        self._training, self._truth = training, truth
        extractor, size = training.model.feature_extractor, training.config.size
        self._test = FeatureCache(extractor, test, size, budget, "test pictures", read)
        self._held_out = FeatureCache(extractor, held_out, size, budget, "held-out pictures", read)

    @property
    def place(self) -> str:
        """Where the features of the test pictures are kept."""
        return self._test.place

    def __call__(self) -> tuple[float | None, float | None, float | None]:
        """Image and pixel AUROC on the test pictures and the loss on the held-out ones, of those there are."""
        with self._training.average.applied():
            val_loss = mean_loss(self._training.model, self._held_out) if len(self._held_out) else None
            return *measure_while_training(self._training.model, self._test, self._truth), val_loss


def measure(scores: Scores, truth: GroundTruth) -> tuple[float | None, float | None]:
    """Image and pixel AUROC over a test set, as published: pixels of all pictures together.

    In [0, 1]; None where there is nothing to measure: no defects, or defects without masks.
    """
    pixel = None if truth.masks is None else auroc(scores.pixel, truth.masks)
    return auroc(scores.image, truth.labels), pixel


def measure_all(scores: Scores, truth: GroundTruth) -> dict[str, float | None]:
    """Every figure of a test set, by its key in eval.json; see utils/metrics.py.

    All but the thresholds are in [0, 1]; None where there is nothing to measure, as in `measure`.
    """
    image, pixel = measure(scores, truth)
    image_f1, image_threshold = f1_max(scores.image, truth.labels) or (None, None)
    pixel_ap = pixel_f1 = pixel_threshold = overlap = None
    if truth.masks is not None:
        pixel_ap = average_precision(scores.pixel, truth.masks)
        pixel_f1, pixel_threshold = f1_max(scores.pixel, truth.masks) or (None, None)
        overlap = aupro(scores.pixel, truth.masks)
    return {
        "pixel_auroc": pixel,
        "image_auroc": image,
        "image_ap": average_precision(scores.image, truth.labels),
        "pixel_ap": pixel_ap,
        "image_f1_max": image_f1,
        "image_f1_threshold": image_threshold,
        "pixel_f1_max": pixel_f1,
        "pixel_f1_threshold": pixel_threshold,
        "aupro": overlap,
    }


def measure_defects(
    scores: Scores, truth: GroundTruth, test: Sequence[LabelledImage], config: Config, threshold: float
) -> dict[str, dict[str, float | int | None]]:
    """Figures of each defect's folder, by its name: as if its pictures and the good ones were the whole test set.

    Pixels are measured in every folder that has masks, whether the others have any or not.

    Args:
        scores: of the N pictures.
        truth: of them.
        test: the N pictures.
        config: of the model; the rule of the masks.
        threshold: a picture is an anomaly above it.

    Returns:
        `image_auroc`, `pixel_auroc` and `aupro`, in [0, 1], or None as in `measure`; `images_with_mask`;
        `defect_test_pictures`, how many of the folder count as such, and `missed_defects`, how many of these are not
        above the threshold.

    Raises:
        UserError: a mask cannot be read.
    """
    folders = np.array([image.defect for image in test], dtype=object)
    good = np.array([image.defect is None for image in test], dtype=bool)
    good_pixels = np.sort(scores.pixel[good], axis=None)  # once for all folders: no mask lies in them
    rows = {}
    for name in dict.fromkeys(folders[~good]):
        of = folders == name
        if truth.masks is None:  # of some folder, not of this one perhaps
            masks = load_ground_truth(
                [image for image in test if image.defect == name], config.size, config.mask_rule
            ).masks
        else:
            masks = truth.masks[of]
        rows[name] = {
            "image_auroc": auroc(scores.image[of | good], truth.labels[of | good]),
            "pixel_auroc": None if masks is None else auroc(scores.pixel[of], masks, good_pixels),
            "aupro": None if masks is None else aupro(scores.pixel[of], masks, others=good_pixels),
            "images_with_mask": 0 if masks is None else len(masks),
            "defect_test_pictures": int(truth.labels[of].sum()),
            "missed_defects": int((truth.labels[of] & (scores.image[of] <= threshold)).sum()),
        }
    return rows


def measure_regions(
    scores: Scores, truth: GroundTruth, test: Sequence[LabelledImage], thresholds: Thresholds
) -> dict[str, Any] | None:
    """How the regions that are found meet the true ones; None where some defect has no mask, or without pictures.

    A true region, a connected area of the mask, is hit if a pixel of it lies in a found region. A found region is false
    if no pixel of it lies in a true one. Both are looked for at the size of each picture, pixels that touch at a corner
    being in one region.

    Args:
        scores, truth, test: of the same pictures.
        thresholds: the pixel threshold, and the least pixels of a found region.

    Returns:
        `true`, how many there are; `hit`, how many of these; `found` and `false` in the same way; `false_per_picture`;
        `pictures`, by path the four numbers of each picture where there are any.
    """
    if truth.masks is None:
        return None
    keys = ("true", "hit", "found", "false")
    pictures: dict[str, dict[str, int]] = {}
    for image, anomaly_map, mask in zip(test, scores.pixel, truth.masks, strict=True):
        size = upright_size(image.path)
        regions, found = find_regions(anomaly_map, size, thresholds.pixel, thresholds.min_area)
        true = cv2.resize(np.uint8(mask), size[::-1], interpolation=cv2.INTER_NEAREST)
        count, labels = cv2.connectedComponents(true, connectivity=8)
        both = found & true.view(bool)
        hit = len(np.unique(labels[both]))
        right = len(np.unique(cv2.connectedComponents(np.uint8(found), connectivity=8)[1][both]))
        numbers = (count - 1, hit, len(regions), len(regions) - right)
        if any(numbers):
            pictures[str(image.path)] = dict(zip(keys, numbers, strict=True))
    total = {key: sum(numbers[key] for numbers in pictures.values()) for key in keys}
    return {**total, "false_per_picture": total["false"] / len(test), "pictures": pictures}
