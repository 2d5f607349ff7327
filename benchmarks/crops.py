"""A harder category made of bottle's photographs: python -m benchmarks.crops --output FOLDER

bottle is so easy that no training falls over on it. A crop of 128 x 128 pixels, from anywhere in a picture and turned
by any angle, looks different each time, and 40 of them are few to learn from: a training that goes on for long learns
them by heart. Good crops come from good pictures, defect crops from around a pixel of a defect's mask. The category is
`crops`, in MVTec AD's layout; the pictures are those of bottle in the folder that FASTFLOW_MVTEC_DIR names.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from datasets.mvtec import load_category
from deploy.common.cli import ArgumentParser, UserError, positive_int, run_main
from deploy.common.files import make_folder
from deploy.common.imaging import read_mask, read_rgb, resize, write_picture

SIDE = 128  # of a crop, in pixels
FROM = 256  # side of the pictures that crops are cut out of
GOOD_CROPS = 3  # of each good test picture
DEFECT_PIXELS = 60  # that a defect crop shows at least
ATTEMPTS = 200


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmarks.crops", description="Make a harder category of bottle's photographs.")
    parser.add_argument("--data", default=os.environ.get("FASTFLOW_MVTEC_DIR"), help="the folder that holds bottle")
    parser.add_argument("--output", type=Path, required=True, help="the folder that the category is written to")
    parser.add_argument("--pictures", type=positive_int, default=40, help="to learn from (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.data:
        raise UserError("--data: name the folder of MVTec AD's categories, or set FASTFLOW_MVTEC_DIR")
    bottle = load_category(Path(args.data), "bottle")
    random = np.random.default_rng(0)
    folder = args.output / "crops"
    nothing = np.zeros((FROM, FROM), np.uint8)
    for path in bottle.train[: args.pictures]:
        picture, _ = crop(resize(read_rgb(path), FROM, FROM), nothing, random)
        write(folder / "train/good" / path.name, picture)
    for image in bottle.test:
        picture = resize(read_rgb(image.path), FROM, FROM)
        mask = resize(read_mask(image.masks[0]), FROM, FROM) if image.masks else nothing
        kind = image.defect or "good"
        for i in range(1 if image.defect else GOOD_CROPS):
            name = f"{image.path.stem}_{i}"
            part, truth = crop(picture, mask, random)
            write(folder / "test" / kind / f"{name}.png", part)
            if image.defect:
                write(folder / "ground_truth" / kind / f"{name}_mask.png", np.repeat(truth[..., None], 3, axis=2))
    print(f"{folder}: {len(bottle.train[: args.pictures])} pictures to learn from")


def crop(picture: np.ndarray, mask: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A turned crop, and the mask's part of it: of a place near the mask's pixels where there are any.

    Args:
        picture: (H, W, 3) uint8.
        mask: (H, W) uint8, 255 where the defect is.

    Returns:
        (128, 128, 3) and (128, 128), uint8.

    Raises:
        UserError: no crop was found that shows enough of the defect.
    """
    half = SIDE // 2
    marked = np.argwhere(mask == 255)
    for _ in range(ATTEMPTS):
        if len(marked):
            centre = marked[random.integers(len(marked))] + random.integers(-40, 41, 2)
        else:
            centre = random.integers(half, FROM - half, 2)
        y, x = np.clip(centre, half, FROM - half)
        turn = cv2.getRotationMatrix2D((float(x), float(y)), random.uniform(0, 360), 1.0)
        turn[:, 2] += half - x, half - y
        truth = _warped(mask, turn, cv2.INTER_NEAREST)
        if not len(marked) or (truth == 255).sum() >= DEFECT_PIXELS:
            return _warped(picture, turn, cv2.INTER_LINEAR), truth
    raise UserError(f"no crop of {ATTEMPTS} shows {DEFECT_PIXELS} pixels of the defect")


def _warped(picture: np.ndarray, matrix: Sequence[Sequence[float]], interpolation: int) -> np.ndarray:
    return cv2.warpAffine(picture, matrix, (SIDE, SIDE), flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)


def write(path: Path, picture: np.ndarray) -> None:
    make_folder(path.parent)
    write_picture(path, picture)


if __name__ == "__main__":
    run_main(main)
