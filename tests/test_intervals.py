"""Intervals of the figures."""

import numpy as np
import pytest

from datasets.mvtec import GroundTruth
from utils import intervals
from utils.evaluation import Scores, measure_all
from utils.report import TITLES


def a_test_set(count=40, defects=24, size=48, spread=0.1):
    """Noisy maps in which defects are brighter, with masks of one or two regions."""
    random = np.random.default_rng(0)
    masks = np.zeros((count, size, size), bool)
    for mask in masks[:defects]:
        for _ in range(random.integers(1, 3)):
            y, x = random.integers(0, size - 12, 2)
            mask[y : y + random.integers(2, 12), x : x + random.integers(2, 12)] = True
    maps = 0.4 + spread * random.standard_normal((count, 1, 1)) + 0.05 * random.standard_normal(masks.shape)
    pixel = np.clip(maps + 0.15 * masks, 0, 1).astype(np.float32)
    image = np.float32(np.clip(maps.mean(axis=(1, 2)) + 0.1 * masks.any(axis=(1, 2)), 0, 1))
    return Scores(image, pixel), GroundTruth(masks.any(axis=(1, 2)), masks)


def test_each_figure_lies_within_its_interval():
    scores, truth = a_test_set()
    figures, spans = measure_all(scores, truth), intervals.intervals(scores, truth, 0)
    assert set(spans) == set(TITLES)
    for key, (low, high) in spans.items():
        assert 0 <= low < figures[key] < high <= 1, key
        assert high - low < 0.5
    assert spans == intervals.intervals(scores, truth, 0)


def test_the_histograms_give_the_exact_figures(monkeypatch):
    """With each picture drawn once, the figures are those of eval.json; pixels as near as their bins let them be."""
    monkeypatch.setattr(intervals, "_draw_pictures", lambda labels, _: np.ones((1, len(labels))))
    scores, truth = a_test_set()
    figures, spans = measure_all(scores, truth), intervals.intervals(scores, truth, 0)
    for key, (low, high) in spans.items():
        assert low == high
        assert low == pytest.approx(figures[key], abs=1e-12 if key.startswith("image") else 2e-3), key
    assert spans["pixel_auroc"][0] == pytest.approx(figures["pixel_auroc"], abs=1e-4)


def test_more_pictures_make_narrower_intervals():
    few, many = (
        np.ptp(intervals.intervals(*a_test_set(count, count // 2, 16), 0)["image_auroc"]) for count in (20, 200)
    )
    assert many < 0.6 * few


def test_an_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    """The AUROC of N(1, 1) over N(0, 1) is Phi(1 / sqrt 2) = 0.7602; in 100 test sets few intervals may miss it."""
    monkeypatch.setattr(intervals, "DRAWS", 200)
    random = np.random.default_rng(1)
    labels = np.arange(60) < 30
    hits = 0
    for _ in range(100):
        image = np.float32(random.standard_normal(60) + labels)
        low, high = intervals.intervals(Scores(image, image[:, None, None]), GroundTruth(labels, None), 0)[
            "image_auroc"
        ]
        hits += low <= 0.7602 <= high
    assert hits >= 87


def test_what_was_not_measured_has_no_interval():
    scores, truth = a_test_set()
    of = truth.labels
    assert intervals.intervals(Scores(scores.image[~of], scores.pixel[~of]), GroundTruth(of[~of], None), 0) == {}
    defects_only = Scores(scores.image[of], scores.pixel[of]), GroundTruth(of[of], truth.masks[of])
    assert set(intervals.intervals(*defects_only, 0)) == {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}
    without_masks = intervals.intervals(scores, GroundTruth(of, None), 0)
    assert set(without_masks) == {"image_auroc", "image_ap", "image_f1_max"}


def test_the_interval_of_a_share_is_never_a_point():
    assert intervals.rate_interval(0, 18) == pytest.approx((0, 0.176), abs=1e-3)
    assert intervals.rate_interval(18, 18) == pytest.approx((0.824, 1), abs=1e-3)
    assert intervals.rate_interval(5, 10) == pytest.approx((0.237, 0.763), abs=1e-3)
