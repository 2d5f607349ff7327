"""What is decided of pictures, and how a command tells it: a line and a drawing each, a file of JSON, their sum."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.common.cli import UserError, report_error, warn
from deploy.common.files import make_folder, write_text
from deploy.common.imaging import (
    PUBLISHED_RULE,
    PUBLISHED_THRESHOLD,
    decision_line,
    describe_thresholds,
    draw_result,
    label,
    write_picture,
)


@dataclass(frozen=True)
class Thresholds:
    """`image` and `pixel`, with the rule that gave each: f1, quantile, published, or the option that was given."""

    image: float
    pixel: float
    rule: str
    pixel_rule: str

    def describe(self) -> str:
        """See `describe_thresholds`."""
        return describe_thresholds(self.image, self.rule, self.pixel, self.pixel_rule)

    def or_given(self, args: argparse.Namespace) -> "Thresholds":
        """These, or in their place what --image_threshold and --pixel_threshold say."""
        image, pixel = args.image_threshold, args.pixel_threshold
        given = {} if image is None else {"image": image, "rule": "--image_threshold"}
        given |= {} if pixel is None else {"pixel": pixel, "pixel_rule": "--pixel_threshold"}
        return replace(self, **given)


PUBLISHED_THRESHOLDS = Thresholds(PUBLISHED_THRESHOLD, PUBLISHED_THRESHOLD, PUBLISHED_RULE, PUBLISHED_RULE)


class Results:
    """The results of pictures, told one by one in a `with` block, whose end tells their sum and writes the JSON.

    Whatever ends the block, the JSON holds what was told before.
    """

    def __init__(
        self,
        pictures: Sequence[Path],
        thresholds: Thresholds,
        drawings: Mapping[Path, Path],
        save_json: str | None,
    ) -> None:
        """Make the folders; it is better said now than after all the work that one cannot be written to.

        Args:
            pictures: those that results are to come of. The lines of several begin with their paths.
            thresholds: what decides; a warning says so where nothing can be above one.
            drawings: where to write the drawing of a picture; of one that is not in it nothing is drawn.
            save_json: the file for a line of JSON per picture, in the order of `pictures`; None for none.

        Raises:
            UserError: a folder cannot be made or written to.
        """
        self._pictures, self._thresholds, self._drawings = pictures, thresholds, drawings
        self._json = Path(save_json) if save_json else None
        self._known: dict[Path, dict[str, Any]] = {}
        for folder in {drawing.parent for drawing in drawings.values()} | (
            {self._json.parent} if self._json else set()
        ):
            make_folder(folder)
        for what, value, rule, effect in (
            ("image", thresholds.image, thresholds.rule, "no picture is an anomaly"),
            ("pixel", thresholds.pixel, thresholds.pixel_rule, "no pixel is marked"),
        ):
            if value >= 1:
                warn(f"{what} threshold {value:g} ({rule}): scores end at 1, so {effect}")

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._json:
            lines = [
                json.dumps(self._known[path], ensure_ascii=False) for path in self._pictures if path in self._known
            ]
            write_text(self._json, "".join(f"{line}\n" for line in lines))
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

    def add(self, path: Path, score: float, anomaly_map: np.ndarray, picture: np.ndarray | None) -> None:
        """Tell what a picture's score comes to, and draw it if there is a place for that.

        Args:
            path: one of the pictures.
            score: in [0, 1].
            anomaly_map: (h, w) float, the smoothed map in [0, 1].
            picture: (H, W, 3) uint8 RGB; None only where it is not drawn.
        """
        image = self._thresholds.image
        print(decision_line(score, image, path if len(self._pictures) > 1 else None), flush=True)
        self._known[path] = {"path": str(path), "score": score, "label": label(score, image), "threshold": image}
        if path in self._drawings:
            try:
                drawing = draw_result(picture, anomaly_map, score, image, self._thresholds.pixel)
                write_picture(self._drawings[path], drawing)
            except UserError as error:
                self.fail(path, error)  # its score still counts

    def fail(self, path: Path, error: UserError) -> None:
        """Tell that a picture cannot be read or drawn; the others still count."""
        report_error(error)
        self._known.setdefault(path, {"path": str(path)})["error"] = str(error)
