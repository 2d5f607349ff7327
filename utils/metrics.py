"""Pure functions on arrays."""

import numpy as np


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve, exact: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: any shape, finite.
        labels: bool, the same shape; True is the positive (anomalous) class.

    Returns:
        in [0, 1], or None if one of the classes is empty: there is no curve then.
    """
    positives = np.sort(scores[labels])
    negatives = np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        return None
    # For each positive: negatives below it plus half of those equal to it (Mann-Whitney U).
    below = np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64)
    return float((below + not_above) / (2 * len(positives) * len(negatives)))
