"""Defects drawn on good pictures: where they are, how large and how strong."""

import numpy as np
import pytest

from datasets.drawn_defects import KINDS, draw_defect


@pytest.fixture(scope="module")
def picture():
    """A grey gradient with stripes: textured everywhere, with room to both sides."""
    rows, columns = np.mgrid[:160, :200]
    grey = 60 + 80 * (columns // 4 % 2) + rows / 4
    return np.repeat(np.uint8(grey)[..., None], 3, axis=2)


def drawn(picture, kind, size, contrast, seeds=range(12)):
    """Those of some seeds that could be drawn."""
    found = (draw_defect(np.random.default_rng(seed), picture, picture[::-1], kind, size, contrast) for seed in seeds)
    return [drawing for drawing in found if drawing]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_defect_is_changed_and_the_picture_given_stays(picture, kind):
    before = picture.copy()
    for changed, mask in drawn(picture, kind, 20, 0.1):
        assert changed.shape == picture.shape and changed.dtype == np.uint8
        assert (changed[mask == 0] == picture[mask == 0]).all()
        assert (changed != picture).any()
    assert (picture == before).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", [0.1, 0.2])
def test_the_contrast_is_the_mean_change(picture, kind, contrast):
    drawings = drawn(picture, kind, 30, contrast)
    assert drawings or (kind, contrast) == ("smear", 0.2)  # no place of these stripes changes so much
    for changed, mask in drawings:
        change = np.abs(changed.astype(float) - picture).max(axis=2) / 255
        assert (change * (mask > 0)).sum() / mask.sum() == pytest.approx(contrast, rel=0.12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 12, 24])
def test_the_size_is_the_longest_extent(picture, kind, size):
    drawings = drawn(picture, kind, size, 0.1, range(6))
    assert drawings or (kind, size) == ("smear", 3)  # narrower than the stripes
    for _, mask in drawings:
        inside = np.argwhere(mask > 0.3)
        if not len(inside):  # a scratch of 3 px is thinner than a pixel
            assert (kind, size) == ("scratch", 3)
            continue
        extent = np.linalg.norm(inside[:, None] - inside, axis=2).max() + 1
        assert extent == pytest.approx(size, rel=0.1, abs=2)


def test_a_scratch_is_thin(picture):
    areas = {kind: np.mean([mask.sum() for _, mask in drawn(picture, kind, 40, 0.1)]) for kind in ("scratch", "blob")}
    assert areas["scratch"] < 0.2 * areas["blob"]


def test_the_same_seed_draws_the_same(picture):
    (first, _), (second, _), (third, _) = drawn(picture, "blob", 20, 0.2, seeds=(5, 5, 6))
    assert (first == second).all()
    assert (first != third).any()


def test_what_cannot_be_drawn_is_none(picture):
    flat = np.full((64, 64, 3), 128, np.uint8)
    assert not drawn(flat, "smear", 10, 0.1)
    assert not drawn(flat, "blob", 64, 0.1)  # it does not fit in
    assert drawn(flat, "blob", 10, 0.1)


def test_white_pictures_get_darker_and_grey_ones_no_colour():
    white = np.full((64, 64, 3), 255, np.uint8)
    for changed, mask in drawn(white, "blob", 10, 0.2):
        assert changed[mask > 0.9].mean() < 255 - 45
        assert np.ptp(changed, axis=2).max() == 0


def test_pieces_come_from_the_other_picture_too():
    plain, other = np.full((64, 64, 3), 100, np.uint8), np.full((32, 32, 3), 200, np.uint8)
    drawings = [draw_defect(np.random.default_rng(seed), plain, other, "piece", 10, 0.3) for seed in range(12)]
    assert any(drawings) and not all(drawings)  # the plain one has no other place
