"""Regions: boxes, areas and scores in the picture's own pixels; how eval.py counts them; maps and masks as files."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets.mvtec import GroundTruth, LabelledImage
from deploy.common.decisions import Result, Thresholds, places_of
from deploy.common.regions import Region, find_regions, stretch

THRESHOLDS = Thresholds(0.5, 0.5, "f1", "f1")


def spots(size, *places):
    """A map with a square of 3 x 3 at each row, column and score."""
    scores = np.zeros(size, np.float32)
    for y, x, score in places:
        scores[y : y + 3, x : x + 3] = score
    return scores


def test_regions_in_the_maps_own_pixels():
    scores = spots((20, 30), (2, 5, 0.6), (10, 20, 0.9), (13, 23, 0.7), (10, 5, 0.5))  # the second and third touch
    scores[11, 21] = 0.95
    regions, mask = find_regions(scores, (20, 30), 0.5)
    assert regions == [
        Region((20, 10, 6, 6), 18, (22.5, 12.5), 0.95, round((8 * 0.9 + 0.95 + 9 * 0.7) / 18, 5)),
        Region((5, 2, 3, 3), 9, (6.0, 3.0), 0.6, 0.6),
    ]
    np.testing.assert_array_equal(mask, scores > 0.5)
    json.dumps([region.to_dict() for region in regions])


def test_small_regions_are_left_out_of_the_mask_too():
    scores = spots((20, 30), (2, 5, 0.9), (10, 20, 0.6), (13, 23, 0.7))
    regions, mask = find_regions(scores, (20, 30), 0.5, min_area=10)
    assert [region.area for region in regions] == [18]
    np.testing.assert_array_equal(mask, (scores > 0.5) & (scores < 0.8))
    assert find_regions(scores, (20, 30), 0.5, min_area=9)[0][0].highest == 0.9


@pytest.mark.parametrize("size", [(40, 90), (7, 9), (20, 30), (123, 61)])
def test_regions_mask_and_map_of_another_size_belong_together(size):
    random = np.random.default_rng(1)
    scores = cv2.GaussianBlur(random.random((20, 30), np.float32), (0, 0), 2)
    scores = (scores - scores.min()) / np.ptp(scores)
    regions, mask = find_regions(scores, size, 0.5)
    whole = stretch(scores, size)
    np.testing.assert_array_equal(mask, whole > 0.5)
    assert len(regions) >= 1 and sum(region.area for region in regions) == mask.sum()
    for region in regions:
        x, y, width, height = region.box
        assert 0 <= x < x + width <= size[1] and 0 <= y < y + height <= size[0]
        assert whole[y : y + height, x : x + width].max() == pytest.approx(region.highest, abs=1e-5)
    assert [region.highest for region in regions] == sorted((region.highest for region in regions), reverse=True)


def test_nothing_above_the_threshold():
    regions, mask = find_regions(np.full((4, 4), 0.5, np.float32), (8, 6), 0.5)
    assert (regions, mask.shape, mask.any()) == ([], (8, 6), False)


def test_the_order_is_one_that_rounding_does_not_change():
    scores = spots((20, 30), (2, 5, 0.9), (10, 20, 0.9 + 3e-7), (2, 20, 0.9 + 1e-7))
    assert [region.box[:2] for region in find_regions(scores, (20, 30), 0.5)[0]] == [(5, 2), (20, 2), (20, 10)]


def test_a_result_has_the_size_of_the_picture():
    picture = np.full((60, 90, 3), 128, np.uint8)
    result = Result(0.95, spots((20, 30), (2, 5, 0.9)), (60, 90), THRESHOLDS, picture, "a.png")
    assert (result.label, result.map.shape, result.map.dtype, result.mask.shape) == (
        *("Anomaly", (60, 90), np.float32),
        (60, 90),
    )
    (region,) = result.regions
    x, y, width, height = region.box
    assert abs(x - 15) <= 2 and abs(y - 6) <= 2 and abs(width - 9) <= 3 and abs(height - 9) <= 3
    assert result.to_dict() == {
        **{"path": "a.png", "score": 0.95, "label": "Anomaly", "threshold": 0.5, "pixel_threshold": 0.5},
        **{"size": [60, 90], "regions": [region.to_dict()]},
    }
    assert isinstance(result.draw(), Image.Image)


def test_the_drawing_numbers_its_regions_unless_they_are_many():
    picture = np.zeros((256, 256, 3), np.uint8)

    def boxes(places):  # white pixels of the drawing's last panel, below its title
        scores = spots((64, 64), *places)
        drawing = np.asarray(Result(0.9, scores, (256, 256), THRESHOLDS, picture).draw())
        panel = drawing[60:300, -260:-10]
        return int((panel == 255).all(axis=2).sum())

    few = boxes([(10, 10, 0.9), (40, 40, 0.8)])
    assert few > boxes([(10, 10, 0.9)]) > 0
    assert boxes([(y, x, 0.9) for y in range(4, 60, 10) for x in range(4, 60, 10)]) == 0


@pytest.mark.parametrize(("kind", "tolerance"), [("png", 1e-5), ("tiff", 0), ("npy", 0)])
def test_maps_and_masks_as_files(tmp_path, kind, tolerance):
    paths = [tmp_path / "in/a.png", tmp_path / "in/sub/a.png", tmp_path / "in/a.jpg"]
    places = places_of(paths, tmp_path / "out", kind, True)
    result = Result(0.9, spots((20, 30), (2, 5, 0.9)), (40, 60), THRESHOLDS, np.zeros((40, 60, 3), np.uint8))
    for place in places.values():
        place.make_folders()
        place.write(result)
    out = tmp_path / "out"
    for name in ("a.png", "sub/a.png", "a.jpg"):
        file = out / "maps" / f"{name}.{kind}"
        values = np.load(file) if kind == "npy" else np.asarray(Image.open(file))
        assert values.dtype == (np.uint16 if kind == "png" else np.float32)
        np.testing.assert_allclose(values / (65535 if kind == "png" else 1), result.map, rtol=0, atol=tolerance)
        mask = np.asarray(Image.open(out / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(mask, 255 * result.mask)
        assert (out / f"{name}.jpg").is_file()
    assert len([file for file in out.rglob("*") if file.is_file()]) == 9


def test_how_found_regions_meet_true_ones(tmp_path):
    from utils.evaluation import Scores, measure_regions

    images = []
    for i, name in enumerate(("good", "hit", "missed")):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (60, 40)).save(path)
        images.append(LabelledImage(path, None if i == 0 else "scratch", []))
    masks = np.zeros((3, 20, 30), bool)
    masks[1, 2:5, 5:8] = masks[1, 14:16, 2:4] = masks[2, 2:4, 2:4] = True
    maps = np.stack(
        [
            spots((20, 30), (10, 10, 0.9)),  # false
            spots((20, 30), (3, 6, 0.9), (4, 9, 0.7), (12, 20, 0.9)),  # two that hit one, touching; a false one
            spots((20, 30)),
        ]
    )
    maps[1, 18, 28] = 0.99  # false, and small
    scores = Scores(maps.max(axis=(1, 2)), maps)
    truth = GroundTruth(np.array([False, True, True]), masks)
    told = measure_regions(scores, truth, images, Thresholds(0.5, 0.5, "f1", "f1", min_area=9))
    assert told.pop("false_per_picture") == pytest.approx(2 / 3)
    pictures = told.pop("pictures")
    assert told == {"true": 3, "hit": 1, "found": 3, "false": 2}
    assert pictures[str(images[0].path)] == {"true": 0, "hit": 0, "found": 1, "false": 1}
    assert pictures[str(images[1].path)] == {"true": 2, "hit": 1, "found": 2, "false": 1}
    assert measure_regions(scores, truth, images, THRESHOLDS)["false"] == 3
    assert measure_regions(scores, GroundTruth(truth.labels, None), images, THRESHOLDS) is None
