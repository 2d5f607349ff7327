"""Pure functions on arrays. All are exact: every score is a threshold, ties count as what they are.

`scores` are finite and of any shape, `labels` are bool of the same shape; True is the positive (anomalous) class.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from deploy.common.runtime import available_cores

WORTH_A_THREAD = 500_000  # scores to sort


def auroc(scores: np.ndarray, labels: np.ndarray, others: Sequence[float] = ()) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores, labels: as everywhere here.
        others: (K,) ascending, scores of further negatives; figures that share them sort them once.

    Returns:
        in [0, 1], or None if one of the classes is empty: there is no curve then.
    """
    positives, negatives = np.sort(scores[labels]), scores[~labels]
    total = len(negatives) + len(others)
    if not len(positives) or not total:
        return None

    def twice_the_wins(ascending: np.ndarray) -> int:
        """Of the positives over these negatives; a tie is half a win (Mann-Whitney U)."""
        return sum(np.searchsorted(ascending, positives, side=side).sum(dtype=np.int64) for side in ("left", "right"))

    # The sort takes most of the time of an evaluation; numpy lets other threads work meanwhile.
    parts = np.array_split(negatives, min(available_cores(), 1 + len(negatives) // WORTH_A_THREAD))
    with ThreadPoolExecutor(len(parts)) as pool:
        wins = sum(pool.map(lambda part: twice_the_wins(np.sort(part)), parts)) + twice_the_wins(others)
    return float(wins / (2 * len(positives) * total))


def roc_curve(scores: np.ndarray, labels: np.ndarray, points: int = 500) -> tuple[np.ndarray, np.ndarray] | None:
    """Points of the ROC curve to draw, from (0, 0) to (1, 1): false and true positive rates, (K,) each, rising.

    They are at `points` positives and `points` negatives, evenly spaced by rank; at all of them where there are no
    more. None if one of the classes is empty.
    """
    classes = positives, negatives = _sorted_classes(scores, labels)
    if not len(positives) or not len(negatives):
        return None
    picked = [x[np.linspace(0, len(x) - 1, min(points, len(x))).astype(int)] for x in classes]
    thresholds = np.unique(np.concatenate(picked))[::-1]
    true, false = (np.append(0, _at_least(thresholds, x) / len(x)) for x in classes)
    return false, true


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the precision-recall curve as a step function: sum over thresholds of (R_n - R_(n-1)) P_n.

    As scikit-learn defines it. Each positive adds 1 / positives to the recall R at its own score, so this is the mean
    over positives of the precision P among all that score at least as much.

    Returns:
        in (0, 1], or None if one of the classes is empty.
    """
    positives, negatives = _sorted_classes(scores, labels)
    if not len(positives) or not len(negatives):
        return None
    true, false = _at_least(positives, positives), _at_least(positives, negatives)
    return float((true / (true + false)).mean())


def f1_max(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
    """The highest F1 = 2 TP / (2 TP + FP + FN) that a threshold reaches, and that threshold.

    What scores above the threshold (`>`) is accepted; the threshold is the largest number of the scores' own type
    below the lowest accepted score, so the decision is the same for float32 arrays and for Python floats. Of equal
    F1s the lowest threshold counts: it misses the fewest positives.

    Returns:
        F1 in (0, 1] and its threshold, or None if one of the classes is empty.
    """
    positives, negatives = _sorted_classes(scores, labels)
    if not len(positives) or not len(negatives):
        return None
    # A threshold that is best accepts a positive last: to accept negatives after it only lowers F1.
    true, false = _at_least(positives, positives), _at_least(positives, negatives)
    f1 = 2 * true / (true + false + len(positives))
    best = f1.argmax()  # the first of equals, and the positives are sorted
    return float(f1[best]), float(np.nextafter(positives[best], -np.inf))


def f1_score(accepted: np.ndarray, labels: np.ndarray) -> float | None:
    """F1 = 2 TP / (2 TP + FP + FN) of a decision, bool of the labels' shape; None without positives."""
    if not labels.any():
        return None
    return float(2 * (accepted & labels).sum() / (accepted.sum() + labels.sum()))


def aupro(scores: np.ndarray, masks: np.ndarray, limit: float = 0.3, others: Sequence[float] = ()) -> float | None:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    As MVTec AD defines it (Bergmann et al. 2021, doi 10.1007/s11263-020-01400-4): at each threshold PRO is the mean,
    over the 8-connected regions of all masks, of the share of a region's pixels that are accepted; FPR is the share
    of accepted pixels among all normal pixels of all pictures. The curve is PRO over FPR, straight between its
    points, which also says what ties and the cut at the limit mean.

    Args:
        scores: (N, H, W), finite.
        masks: (N, H, W) bool.
        limit: the highest FPR, in (0, 1].
        others: (K,) ascending, scores of further normal pixels, as in `auroc`.

    Returns:
        in [0, 1], or None if no pixel or every pixel is in a mask.
    """
    positives, negatives = scores[masks], np.sort(scores[~masks])
    total = len(negatives) + len(others)
    if not len(positives) or not total:
        return None
    order = positives.argsort()  # which makes the searches faster
    positives, weights = positives[order], _region_weights(masks)[order]
    # A pixel of a region joins the curve while the FPR goes from `left`, of what scores more than it, to `right`, of
    # what scores as much: in proportion on the way, as a whole from there on.
    left, right = (
        (total - sum(np.searchsorted(ascending, positives, side) for ascending in (negatives, others))) / total
        for side in ("right", "left")
    )
    way = np.clip(limit - left, 0, right - left)  # how much of it lies before the limit
    joined = np.divide(way, right - left, out=np.zeros_like(way), where=way > 0)
    areas = way * joined / 2 + np.maximum(limit - right, 0)
    return min(float((weights * areas).sum() / limit), 1.0)  # sums of roundings may pass it


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """What each mask pixel counts in PRO, in the order of `scores[masks]`: 1 / (pixels of its region * regions)."""
    shares, regions = zip(*map(region_shares, masks), strict=True)
    return np.concatenate(shares) / sum(regions)


def region_shares(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """What share of its region each pixel of a mask (H, W) is, in the order of `scores[mask]`; how many regions."""
    regions, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)  # (H, W), 0 outside
    own = labels[mask] - 1
    return 1 / np.bincount(own)[own], regions - 1


def _sorted_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the positives and of the negatives, ascending."""
    return np.sort(scores[labels]), np.sort(scores[~labels])


def _at_least(thresholds: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """How many of the sorted scores are >= each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")
