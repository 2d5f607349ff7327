"""Pure functions on arrays. All are exact: every score is a threshold, ties count as what they are.

`scores` are finite and of any shape, `labels` are bool of the same shape; True is the positive (anomalous) class.
"""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from deploy.common.runtime import available_cores

WORTH_A_THREAD = 500_000  # scores to sort


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Returns:
        in [0, 1], or None if one of the classes is empty: there is no curve then.
    """
    positives, negatives = np.sort(scores[labels]), scores[~labels]
    if not len(positives) or not len(negatives):
        return None

    def twice_the_wins(part: np.ndarray) -> int:
        """Of the positives over these negatives; a tie is half a win (Mann-Whitney U)."""
        part = np.sort(part)
        return sum(np.searchsorted(part, positives, side=side).sum(dtype=np.int64) for side in ("left", "right"))

    # The sort takes most of the time of an evaluation; numpy lets other threads work meanwhile.
    parts = np.array_split(negatives, min(available_cores(), 1 + len(negatives) // WORTH_A_THREAD))
    with ThreadPoolExecutor(len(parts)) as pool:
        wins = sum(pool.map(twice_the_wins, parts))
    return float(wins / (2 * len(positives) * len(negatives)))


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


def aupro(scores: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float | None:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    As MVTec AD defines it (Bergmann et al. 2021, doi 10.1007/s11263-020-01400-4): at each threshold PRO is the mean,
    over the 8-connected regions of all masks, of the share of a region's pixels that are accepted; FPR is the share
    of accepted pixels among all normal pixels of all pictures. The curve is PRO over FPR, straight between its
    points, which also says what ties and the cut at the limit mean.

    Args:
        scores: (N, H, W), finite.
        masks: (N, H, W) bool.
        limit: the highest FPR, in (0, 1].

    Returns:
        in [0, 1], or None if no pixel or every pixel is in a mask.
    """
    positives, negatives = scores[masks], np.sort(scores[~masks])
    if not len(positives) or not len(negatives):
        return None
    order = positives.argsort()
    positives = positives[order]
    # pro[i]: PRO where positives[i:] are accepted
    pro = np.append(_region_weights(masks)[order][::-1].cumsum()[::-1], 0.0)

    # The curve moves right at the scores of negatives only, v, each in a step from `left` to `right`.
    total = len(negatives)
    first = np.flatnonzero(np.append(True, negatives[1:] != negatives[:-1]))  # of each group of equal negatives
    right, left = (total - first) / total, (total - np.append(first[1:], total)) / total  # FPR of >= v, of > v
    inside = left < limit
    v, right, left = negatives[first[inside]], right[inside], left[inside]
    upper, lower = pro[np.searchsorted(positives, v, side="left")], pro[np.searchsorted(positives, v, side="right")]
    part = np.clip((limit - left) / (right - left), 0, 1)  # of the step from left to right
    areas = (right - left) * part * (lower + (upper - lower) * part / 2)
    return min(float(areas.sum() / limit), 1.0)  # sums of roundings may pass it


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """What each mask pixel counts in PRO, in the order of `scores[masks]`: 1 / (pixels of its region * regions)."""
    weights = []
    regions = 0
    for mask in masks:
        _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)  # (H, W), 0 outside
        sizes = np.bincount(labels[mask] - 1)
        weights.append(1 / sizes[labels[mask] - 1])
        regions += len(sizes)
    return np.concatenate(weights) / regions


def _sorted_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the positives and of the negatives, ascending."""
    return np.sort(scores[labels]), np.sort(scores[~labels])


def _at_least(thresholds: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """How many of the sorted scores are >= each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")
