"""AUROC against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from utils.metrics import auroc

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(RANDOM.random(500), id="no ties"),
        pytest.param(RANDOM.integers(0, 4, 500), id="four values"),
        pytest.param(np.full(500, 0.25), id="constant"),
        pytest.param(RANDOM.random(500).astype(np.float32).round(2), id="float32 with ties"),
        pytest.param(1 - np.float32(1e-7) * RANDOM.integers(0, 3, 500).astype(np.float32), id="float32 close to 1"),
        pytest.param(-RANDOM.random(500) * 1e30, id="large and negative"),
        pytest.param(RANDOM.integers(0, 9, (5, 10, 10)) / 8, id="3D"),
    ],
)
def test_equals_scikit_learn(scores):
    labels = np.random.default_rng(1).random(scores.shape) < 0.3
    expected = roc_auc_score(labels.ravel(), scores.ravel())
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_perfect_reversed_and_undecided():
    labels = np.array([[True, False], [True, False]])
    scores = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    assert auroc(scores, labels) == 1.0
    assert auroc(-scores, labels) == 0.0
    assert auroc(np.zeros_like(scores), labels) == 0.5


def test_one_positive_among_ties_counts_half():
    assert auroc(np.array([0.5, 0.5, 0.1]), np.array([True, False, False])) == 0.75


@pytest.mark.parametrize("labels", [np.zeros(3, bool), np.ones(3, bool), np.zeros(0, bool)])
def test_without_two_classes_there_is_no_auroc(labels):
    assert auroc(np.arange(float(len(labels))), labels) is None
