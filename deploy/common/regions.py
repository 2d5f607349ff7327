"""Regions: the connected areas of an anomaly map above the pixel threshold, in pixels of the picture itself."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

DECIMALS = 5  # of a region's scores; the runtimes agree on them, so that they agree on the order too


@dataclass(frozen=True)
class Region:
    """One of them. A pixel's place is that of its centre: the first one of a row is at 0."""

    box: tuple[int, int, int, int]  # x and y of its left upper pixel, width, height
    area: int  # pixels
    centre: tuple[float, float]  # x and y, the mean of its pixels'
    highest: float  # of its scores, in [0, 1]
    mean: float  # of its scores

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "box": list(self.box),
            "area": self.area,
            "centre": list(self.centre),
            "highest": self.highest,
            "mean": self.mean,
        }


def stretch(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) float, the map at the model's input size -> (H, W) float32 at the picture's own, bilinear."""
    height, width = size
    return cv2.resize(anomaly_map.astype(np.float32, copy=False), (width, height), interpolation=cv2.INTER_LINEAR)


def find_regions(
    anomaly_map: np.ndarray, size: tuple[int, int], threshold: float, min_area: int = 0
) -> tuple[list[Region], np.ndarray]:
    """The regions of a map, the highest score first, and the pixels that belong to one.

    They are found at the picture's own size, in the map that `stretch` makes; where nothing is above the threshold that
    is left out, and costs nothing. Else it takes ten bytes a pixel of the picture for a moment.

    Args:
        anomaly_map: (h, w) float, the smoothed map in [0, 1], at the model's input size.
        size: height and width of the picture.
        threshold: a pixel counts above it.
        min_area: regions of fewer pixels are left out, of the mask too; 0: none are.

    Returns:
        the regions; the mask, (H, W) bool. Pixels that touch at a corner are in one region.
    """
    if not (anomaly_map > threshold).any():
        return [], np.zeros(size, bool)
    scores = stretch(anomaly_map, size)
    mask = scores > threshold
    count, labels, stats, centres = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_area
    kept[0] = False  # the rest of the picture
    regions = []
    for i in np.flatnonzero(kept):
        x, y, width, height, area = map(int, stats[i])
        part = slice(y, y + height), slice(x, x + width)
        own = np.uint8(labels[part] == i)  # no copy of the scores: a region may be all of a large picture
        highest, mean = cv2.minMaxLoc(scores[part], own)[1], cv2.mean(scores[part], own)[0]
        centre = tuple(round(float(place), 2) for place in centres[i])
        scores_of = round(highest, DECIMALS), round(mean, DECIMALS)
        regions.append(Region((x, y, width, height), area, centre, *scores_of))
    regions.sort(key=lambda region: (-region.highest, region.box[1], region.box[0]))
    return regions, mask if len(regions) == count - 1 else kept[labels]
