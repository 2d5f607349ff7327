"""`inference.yml`, which says all of an exported model that is not in its program."""

import math
from pathlib import Path
from typing import Any

from deploy.backends import model_files
from deploy.common.cli import LARGEST_SIDE, UserError, printable
from deploy.common.files import sha256


def read_description(folder: Path, backend: str = "paddle") -> dict[str, Any]:
    """`inference.yml`, checked against the files beside it that the runtime reads.

    Raises:
        UserError: no exported model there, or its files do not belong together.
    """
    from deploy.common.plain_yaml import read_yaml

    files = model_files(folder, backend)
    for name in ("inference.yml", *files):
        if not (folder / name).is_file():
            kind = "" if backend == "paddle" else " with --format onnx or all"
            raise UserError(f"--save_inference_dir {folder}: {name} is missing; run deploy/export_model.py{kind} first")
    try:
        description = read_yaml(folder / "inference.yml")
        checksums = {name: description["sha256"][name] for name in files}
        description["category"] = str(description["category"])
        description["input_size"] = height, width = [int(side) for side in description["input_size"]]
        if not 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
            raise ValueError(f"input_size must be from 1 to {LARGEST_SIDE}")
        for key, rule in (("image_threshold", "threshold_rule"), ("pixel_threshold", "pixel_threshold_rule")):
            description[key] = float(description[key])
            description[rule] = printable(str(description.get(rule, "not stated")))
        white_level = description.get("white_level")  # exports before it had none
        description["white_level"] = white_level and int(white_level)
        if description["white_level"] is not None and not 1 <= description["white_level"] <= 65535:
            raise ValueError("white_level must be from 1 to 65535")
        description["image_score"] = kind = str(description.get("image_score", "max"))  # that of exports before it
        description["top_share"] = share = float(description["top_share"]) if kind == "top" else None
        if kind not in ("max", "top") or (share is not None and not 0 < share <= 1):
            raise ValueError("image_score must be max, or top with a top_share up to 1")
        description["min_area"] = int(description.get("min_area", 0))  # exports before it had none
        if description["min_area"] < 0:
            raise ValueError("min_area must be at least 0")
        for key in ("mean", "std"):
            description[key] = [float(description[key][channel]) for channel in range(3)]
        numbers = [description["image_threshold"], description["pixel_threshold"], *description["mean"]]
        if not all(map(math.isfinite, (*numbers, *description["std"]))) or min(description["std"]) <= 0:
            raise ValueError("a threshold, mean or std is no number that can be used")
    except KeyError as error:
        raise UserError(f"{folder / 'inference.yml'}: has no {error}; export again") from error
    except (OSError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'inference.yml'}: damaged ({error}); export again") from error
    for name, expected in checksums.items():
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: does not belong to the inference.yml beside it; export again")
    return description
