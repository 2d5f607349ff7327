"""The figures against scikit-learn's, against a literal AUPRO, and by hand."""

import numpy as np
import paddle
import pytest
import skimage.measure
import sklearn.metrics
from scipy import ndimage

from utils import metrics
from utils.evaluation import auroc_on_device
from utils.metrics import aupro, auroc, average_precision, f1_max, f1_score, roc_curve

RANDOM = np.random.default_rng(0)
SCORES = [
    pytest.param(RANDOM.random(500), id="no ties"),
    pytest.param(RANDOM.integers(0, 4, 500), id="four values"),
    pytest.param(np.full(500, 0.25), id="constant"),
    pytest.param(RANDOM.random(500).astype(np.float32).round(2), id="float32 with ties"),
    pytest.param(1 - np.float32(1e-7) * RANDOM.integers(0, 3, 500).astype(np.float32), id="float32 close to 1"),
    pytest.param(-RANDOM.random(500) * 1e30, id="large and negative"),
    pytest.param(RANDOM.integers(0, 9, (5, 10, 10)) / 8, id="3D"),
]


def some_labels(scores):
    """Three of ten, without regard to the scores."""
    return np.random.default_rng(1).random(scores.shape) < 0.3


# ---- AUROC


@pytest.mark.parametrize("scores", SCORES)
def test_auroc_equals_scikit_learn(scores):
    labels = some_labels(scores)
    expected = sklearn.metrics.roc_auc_score(labels.ravel(), scores.ravel())
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_many_scores_on_several_threads(monkeypatch):
    monkeypatch.setattr(metrics, "available_cores", lambda: 3)
    scores = RANDOM.integers(0, 1000, 2 * metrics.WORTH_A_THREAD) / np.float32(1000)
    labels = some_labels(scores)
    assert auroc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_perfect_reversed_and_undecided():
    labels = np.array([[True, False], [True, False]])
    scores = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    assert auroc(scores, labels) == 1.0
    assert auroc(-scores, labels) == 0.0
    assert auroc(np.zeros_like(scores), labels) == 0.5


def test_one_positive_among_ties_counts_half():
    assert auroc(np.array([0.5, 0.5, 0.1]), np.array([True, False, False])) == 0.75


@pytest.mark.parametrize("figure", [auroc, average_precision, f1_max, roc_curve])
@pytest.mark.parametrize("labels", [np.zeros(3, bool), np.ones(3, bool), np.zeros(0, bool)])
def test_without_two_classes_there_is_no_figure(figure, labels):
    assert figure(np.arange(float(len(labels))), labels) is None


# ---- ROC curve


@pytest.mark.parametrize("scores", SCORES)
def test_a_short_roc_curve_is_scikit_learns(scores):
    labels = some_labels(scores)
    false, true, _ = sklearn.metrics.roc_curve(labels.ravel(), scores.ravel(), drop_intermediate=False)
    np.testing.assert_allclose(roc_curve(scores, labels), [false, true], atol=1e-12)


def test_a_long_roc_curve_is_a_few_points_of_the_whole_one():
    labels = RANDOM.random((4, 100, 100)) < 0.02
    scores = RANDOM.random(labels.shape) + labels
    false, true = roc_curve(scores, labels, points=50)
    assert len(false) <= 101
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    whole = sklearn.metrics.roc_curve(labels.ravel(), scores.ravel(), drop_intermediate=False)[:2]
    assert set(zip(false.tolist(), true.tolist(), strict=True)) <= set(zip(*(x.tolist() for x in whole), strict=True))
    assert np.trapezoid(true, false) == pytest.approx(auroc(scores, labels), abs=1e-3)


# ---- average precision


@pytest.mark.parametrize("scores", SCORES)
def test_average_precision_equals_scikit_learn(scores):
    labels = some_labels(scores)
    expected = sklearn.metrics.average_precision_score(labels.ravel(), scores.ravel())
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
    labels = np.array([True, False, True, False])
    assert average_precision(np.array([4, 3, 2, 1]), labels) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert average_precision(np.array([4, 4, 2, 1]), labels) == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 3)
    assert average_precision(np.array([4, 1, 3, 2]), labels) == 1.0
    assert average_precision(np.zeros(4), labels) == 0.5


# ---- F1


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("shift", [0, 0.5])
def test_f1_max_equals_scikit_learn(scores, shift):
    labels = some_labels(scores)
    scores = scores + shift * np.ptp(scores) * labels  # the second time labels and scores go together
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels.ravel(), scores.ravel())
    curve = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best, threshold = f1_max(scores, labels)
    assert best == pytest.approx(curve.max(), abs=1e-9)
    lowest = thresholds[curve[:-1] > curve.max() - 1e-12].min()
    assert threshold == pytest.approx(lowest, rel=1e-6, abs=1e-6)
    for accepted in (scores > threshold, np.reshape([s > threshold for s in scores.ravel().tolist()], scores.shape)):
        np.testing.assert_array_equal(accepted, scores >= lowest)
        assert f1_score(accepted, labels) == pytest.approx(best, abs=1e-12)
        assert sklearn.metrics.f1_score(labels.ravel(), accepted.ravel()) == pytest.approx(best, abs=1e-12)


def test_f1_max_by_hand():
    labels = np.array([True, True, False, True, False])
    best, threshold = f1_max(np.float32([0.9, 0.8, 0.7, 0.6, 0.5]), labels)
    assert best == 6 / 7  # all three positives for one false alarm
    assert threshold == np.nextafter(np.float32(0.6), np.float32(0))


def test_of_equal_f1s_the_lowest_threshold_counts():
    labels = np.array([True, False, False, True])
    best, threshold = f1_max(np.array([4.0, 3.0, 2.0, 1.0]), labels)  # 2 / 3 at 4 and at 1
    assert best == 2 / 3
    assert threshold == np.nextafter(1.0, 0)


def test_f1_of_a_decision():
    labels = np.array([True, True, False, False])
    assert f1_score(np.array([True, False, True, False]), labels) == 0.5
    assert f1_score(~labels, labels) == 0.0
    assert f1_score(labels, np.zeros(4, bool)) is None


# ---- AUPRO


def with_skimage(mask):
    return skimage.measure.label(mask, connectivity=2)


def with_scipy(mask):
    return ndimage.label(mask, np.ones((3, 3)))[0]


def literal_aupro(scores, masks, limit, label):
    """Word for word: threshold by threshold, region by region, trapezoid by trapezoid."""
    regions = []  # (picture, region) each as a mask of its pixels
    for i, labelled in enumerate(map(label, masks)):
        regions += [(i, labelled == number) for number in range(1, labelled.max() + 1)]
    left = lower = area = 0.0
    for threshold in sorted(set(scores.ravel().tolist()), reverse=True):
        accepted = scores >= threshold
        right = accepted[~masks].mean()
        upper = np.mean([accepted[i][region].mean() for i, region in regions])
        if right >= limit:
            at_limit = lower + (upper - lower) * (limit - left) / (right - left) if right > left else upper
            return (area + (limit - left) * (lower + at_limit) / 2) / limit
        area += (right - left) * (lower + upper) / 2
        left, lower = right, upper
    raise AssertionError("the curve ends at a false positive rate of 1")


def blobs(seed, shape=(4, 17, 23), level=0.4):
    """Masks of several regions per picture, of many sizes and touching corners; the last picture has none."""
    noise = np.random.default_rng(seed).normal(size=shape)
    masks = ndimage.gaussian_filter(noise, (0, 1, 1)) > level
    masks[-1] = False
    return masks


@pytest.mark.parametrize("label", [with_skimage, with_scipy])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["random", "ties", "close", "separable", "reversed", "constant"])
def test_aupro_equals_the_literal_one(kind, limit, label):
    masks = blobs(3)
    noise = np.random.default_rng(4).random(masks.shape)
    scores = {
        "random": noise,
        "ties": (noise * 5).round() / 5 + 0.2 * masks,
        "close": (noise + 0.7 * masks).astype(np.float32),
        "separable": noise + masks,
        "reversed": noise - masks,
        "constant": np.full(masks.shape, 0.5),
    }[kind]
    assert aupro(scores, masks, limit) == pytest.approx(literal_aupro(scores, masks, limit, label), abs=1e-9)


@pytest.mark.parametrize("level", [-0.3, 0.1, 0.7])
def test_regions_are_those_of_scikit_image(level):
    masks = blobs(5, (3, 31, 29), level)
    scores = np.random.default_rng(6).integers(0, 20, masks.shape)
    expected = literal_aupro(scores, masks, 0.3, with_skimage)
    assert aupro(scores, masks) == pytest.approx(expected, abs=1e-9)


def test_aupro_of_perfect_and_of_undecided_maps():
    masks = blobs(7)
    assert aupro(masks.astype(np.float32), masks) == pytest.approx(1.0, abs=1e-12)
    assert aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # the diagonal up to 0.3
    assert aupro(-masks.astype(np.float32), masks) == 0.0


def test_every_region_weighs_the_same():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = True  # found
    masks[1, 1:3] = True  # missed, and eight times as large
    scores = np.full(masks.shape, 0.5)
    scores[0, 0, 0] = 0.9
    scores[1, 1:3] = 0.1
    assert aupro(scores, masks) == pytest.approx(0.5)


def test_regions_touch_at_corners_but_not_across_pictures():
    masks = np.zeros((2, 3, 5), bool)
    masks[0, [0, 1], [0, 1]] = True  # one region
    masks[1, 0, 0] = True  # another, though it lies where the picture before has one
    scores = np.where(masks, 0.1, 0.5)
    scores[1, 0, 0] = 0.9
    assert aupro(scores, masks) == pytest.approx(1 / 2)


def test_the_cut_at_the_limit_is_linear():
    masks = np.zeros((1, 1, 12), bool)
    masks[0, 0, :2] = True
    scores = np.zeros(masks.shape)
    scores[0, 0, [0, 2, 3, 4, 5]] = 0.9  # half of the region and 4 of 10 normal pixels at once
    # from (0, 0) straight to (0.4, 0.5), cut at (0.3, 0.375)
    assert aupro(scores, masks) == pytest.approx(0.375 / 2)
    assert aupro(scores, masks, limit=0.4) == pytest.approx(0.25)


@pytest.mark.parametrize("masks", [np.zeros((2, 3, 4), bool), np.ones((2, 3, 4), bool)])
def test_without_regions_or_normal_pixels_there_is_no_aupro(masks):
    assert aupro(np.zeros(masks.shape), masks) is None


@pytest.mark.parametrize("levels", [4, 10**6])
def test_further_negatives_count_as_if_they_were_pictures_of_the_set(levels):
    masks = blobs(8)
    scores = (np.random.default_rng(9).random(masks.shape) + 0.3 * masks).astype(np.float32)
    scores = (scores * levels).round() / np.float32(levels)
    others = np.sort(scores[-1], axis=None)  # the picture without a mask
    assert auroc(scores[:-1], masks[:-1], others) == auroc(scores, masks)
    assert aupro(scores[:-1], masks[:-1], others=others) == pytest.approx(aupro(scores, masks), abs=1e-12)


# ---- on the device, as training on a GPU uses it


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_auroc_on_the_device_is_the_same(levels):
    random = np.random.default_rng(levels)
    scores = (random.integers(0, levels, (4, 30, 30)) / levels).astype(np.float32)
    labels = random.random(scores.shape) < 0.2
    actual = auroc_on_device(paddle.to_tensor(scores), paddle.to_tensor(labels))
    assert actual == pytest.approx(auroc(scores, labels), abs=1e-12)


def test_auroc_on_the_device_without_one_class_is_none():
    scores = paddle.to_tensor([0.25, 0.5])
    for labels in ([True, True], [False, False]):
        assert auroc_on_device(scores, paddle.to_tensor(labels)) is None
