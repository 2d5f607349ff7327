"""What is decided of pictures, and how a command tells it: a line and files each, a file of JSON, their sum."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deploy.common.cli import UserError, report_error, warn
from deploy.common.files import make_folder, write_text
from deploy.common.imaging import (
    PUBLISHED_RULE,
    PUBLISHED_THRESHOLD,
    decision_line,
    describe_thresholds,
    draw_result,
    drawing_paths,
    label,
    write_map,
    write_mask,
    write_picture,
)
from deploy.common.regions import Region, find_regions, stretch


@dataclass(frozen=True)
class Thresholds:
    """`image` and `pixel`, with the rule that gave each: f1, quantile, published, or the option that was given.

    `min_area`: regions of fewer pixels, of the picture, are not told.
    """

    image: float
    pixel: float
    rule: str
    pixel_rule: str
    min_area: int = 0

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "Thresholds":
        """Those of an exported model, by its `inference.yml`."""
        numbers = description["image_threshold"], description["pixel_threshold"]
        rules = description["threshold_rule"], description["pixel_threshold_rule"]
        return cls(*numbers, *rules, description["min_area"])

    def describe(self) -> str:
        """See `describe_thresholds`."""
        return describe_thresholds(self.image, self.rule, self.pixel, self.pixel_rule)

    def or_given(self, image: float | None, pixel: float | None, min_area: int | None = None) -> "Thresholds":
        """These, or in their place what --image_threshold, --pixel_threshold and --min_area say."""
        given: dict[str, Any] = {} if image is None else {"image": image, "rule": "--image_threshold"}
        given |= {} if pixel is None else {"pixel": pixel, "pixel_rule": "--pixel_threshold"}
        given |= {} if min_area is None else {"min_area": min_area}
        return replace(self, **given)

    def warn_where_nothing_is_above(self) -> None:
        """Say which of them no score can be above."""
        for what, value, rule, effect in (
            ("image", self.image, self.rule, "no picture is an anomaly"),
            ("pixel", self.pixel, self.pixel_rule, "no pixel is marked"),
        ):
            if value >= 1:
                warn(f"{what} threshold {value:g} ({rule}): scores end at 1, so {effect}")


PUBLISHED_THRESHOLDS = Thresholds(PUBLISHED_THRESHOLD, PUBLISHED_THRESHOLD, PUBLISHED_RULE, PUBLISHED_RULE)


class Result:
    """What is decided of a picture. Maps, mask and regions are made when they are first asked for, and kept."""

    def __init__(
        self,
        score: float,
        anomaly_map: np.ndarray,
        size: tuple[int, int],
        thresholds: Thresholds,
        drawn: np.ndarray | None = None,
        path: str | Path | None = None,
    ) -> None:
        """
        Args:
            score: of the picture, in [0, 1].
            anomaly_map: (h, w) float, the smoothed map in [0, 1], at the model's input size.
            size: height and width of the picture, turned as EXIF says.
            thresholds: what decides.
            drawn: the picture to draw on, (H, W, 3) uint8 RGB, or what `drawn_size` makes of it; None: it is not drawn.
            path: its file, if it is one.
        """
        self.score = score
        self.size = size
        self.thresholds = thresholds
        self.path = None if path is None else str(path)
        self._model_map, self._drawn = anomaly_map, drawn

    @property
    def label(self) -> str:
        """`Anomaly` if the score is above the image threshold, else `Normal`."""
        return label(self.score, self.thresholds.image)

    @cached_property
    def map(self) -> np.ndarray:
        """(H, W) float32: the smoothed anomaly map in [0, 1], at the picture's own size."""
        return stretch(self._model_map, self.size)

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: the pixels of the regions, which are those above the pixel threshold where min_area is 0."""
        return self._found[1]

    @property
    def regions(self) -> list[Region]:
        """The areas above the pixel threshold, the highest score first; see `deploy.common.regions`."""
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[list[Region], np.ndarray]:
        return find_regions(self._model_map, self.size, self.thresholds.pixel, self.thresholds.min_area)

    def draw(self) -> Image.Image:
        """The picture, its heat map, and what is marked in it with its regions, numbered; see `draw_result`."""
        height, width = self.size
        shares = np.reshape([region.box for region in self.regions], (-1, 4)) / (width, height, width, height)
        thresholds = self.thresholds.image, self.thresholds.pixel
        return Image.fromarray(draw_result(self._drawn, self._model_map, self.score, *thresholds, boxes=shares))

    def to_dict(self) -> dict[str, Any]:
        """As a line of JSON has it: path (of a file), score, label, thresholds, size and regions."""
        path = {} if self.path is None else {"path": self.path}
        return path | {
            "score": self.score,
            "label": self.label,
            "threshold": self.thresholds.image,
            "pixel_threshold": self.thresholds.pixel,
            "size": list(self.size),
            "regions": [region.to_dict() for region in self.regions],
        }


@dataclass(frozen=True)
class Places:
    """Where to write what of a picture; None: nowhere."""

    drawing: Path | None = None
    map: Path | None = None
    mask: Path | None = None

    def make_folders(self) -> None:
        """Make the folders of all of them.

        Raises:
            UserError: one cannot be made or written to.
        """
        for folder in {path.parent for path in (self.drawing, self.map, self.mask) if path}:
            make_folder(folder)

    def write(self, result: Result) -> None:
        """Write what there is a place for.

        Raises:
            UserError: something cannot be written.
        """
        if self.drawing:
            write_picture(self.drawing, np.asarray(result.draw()))
        if self.map:
            write_map(self.map, result.map)
        if self.mask:
            write_mask(self.mask, result.mask)


def places_of(images: Sequence[Path], folder: Path, save_maps: str | None, save_masks: bool) -> dict[Path, Places]:
    """Where to write drawing, map and mask of each picture: `folder` itself, maps/ and masks/; see `drawing_paths`.

    Raises:
        UserError: as `drawing_paths`.
    """
    drawings = drawing_paths(images, folder)
    maps = drawing_paths(images, folder / "maps", f".{save_maps}") if save_maps else {}
    masks = drawing_paths(images, folder / "masks", ".png") if save_masks else {}
    return {path: Places(drawings[path], maps.get(path), masks.get(path)) for path in images}


class Results:
    """The results of pictures, told one by one in a `with` block, whose end tells their sum and writes the JSON.

    Whatever ends the block, the JSON holds what was told before.
    """

    def __init__(self, pictures: Sequence[Path], places: Mapping[Path, Places], save_json: str | None) -> None:
        """Make the folders; it is better said now than after all the work that one cannot be written to.

        Args:
            pictures: those that results are to come of. The lines of several begin with their paths.
            places: where to write what of a picture; of one that is not in it nothing is written.
            save_json: the file for a line of JSON per picture, in the order of `pictures`; None for none.

        Raises:
            UserError: a folder cannot be made or written to.
        """
        self._pictures, self._places = pictures, places
        self._json = Path(save_json) if save_json else None
        self._known: dict[Path, dict[str, Any]] = {}
        for place in places.values():
            place.make_folders()
        if self._json:
            make_folder(self._json.parent)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._json:
            lines = [json_line(self._known[path]) for path in self._pictures if path in self._known]
            write_text(self._json, "".join(lines))
        if kind is None and len(self._pictures) > 1:
            labels = [result["label"] for result in self._known.values() if "label" in result]
            unread = len(self._known) - len(labels)
            print(
                f"{labels.count('Anomaly')} of {len(labels)} anomalies" + f", {unread} could not be read" * bool(unread)
            )

    @property
    def errors(self) -> int:
        """How many pictures were not read or not drawn."""
        return sum("error" in result for result in self._known.values())

    def add(self, path: Path, result: Result) -> None:
        """Tell the result of one of the pictures, and write what there is a place for."""
        alone = len(self._pictures) == 1
        print(decision_line(result.score, result.thresholds.image, None if alone else path), flush=True)
        # Its regions are looked for only where somebody reads them.
        self._known[path] = result.to_dict() if self._json else {"label": result.label}
        try:
            self._places.get(path, Places()).write(result)
        except UserError as error:
            self.fail(path, error)  # its score still counts

    def fail(self, path: Path, error: UserError) -> None:
        """Tell that a picture cannot be read or drawn; the others still count."""
        report_error(error)
        self._known.setdefault(path, {"path": str(path)})["error"] = str(error)


def json_line(result: Mapping[str, Any]) -> str:
    """A result as a line of JSON."""
    return f"{json.dumps(result, ensure_ascii=False)}\n"
