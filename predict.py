"""Look at pictures: python predict.py --category bottle --image_path images/bottle_good.png --exp_dir exp"""

import argparse
from dataclasses import replace
from pathlib import Path

from deploy.common.cli import UserError, add_pictures, run_main
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Result, Results, Thresholds, places_of
from deploy.common.imaging import PictureReader, list_images, preprocess
from utils.config import Config
from utils.options import add_category, common_parser, own_overrides, prepare
from utils.results import category_folder
from utils.thresholds import FILE_NAME, load_thresholds


def parse_args() -> argparse.Namespace:
    parser = common_parser("Score pictures and draw where their defects are.", of_checkpoint=True)
    add_category(parser, "category whose checkpoint is used")
    add_pictures(parser, "what eval.py stored beside the checkpoint, else the published 0.8")
    parser.add_argument(
        "--output_dir",
        help="write the drawings here (the checkpoint's folder: one to result.jpg, several to predictions/)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    images = list_images(*args.image_path)
    config = prepare(args)

    import paddle

    from utils.checkpoint import load_model, white_level_of

    folder = category_folder(args.exp_dir, args.category)
    model, checkpoint = load_model(config, folder / "best.pdparams", own_overrides(args))
    thresholds = choose_thresholds(args, folder / "best.pdparams", model.config)
    read = PictureReader(white_level_of(checkpoint, model.config))
    single = images == [Path(args.image_path[0])]  # a file, not a folder with one
    output = Path(args.output_dir) if args.output_dir else folder if single else folder / "predictions"
    places = places_of(images, output, args.save_maps, args.save_masks)
    if single and not args.output_dir:  # as published
        places[images[0]] = replace(places[images[0]], drawing=output / "result.jpg")
    with Results(images, places, args.save_json) as results:
        thresholds.warn_where_nothing_is_above()
        for path in images:
            try:
                picture = read(path)
            except UserError as error:
                results.fail(path, error)
                continue
            with paddle.no_grad():
                _, smoothed, score = model(paddle.to_tensor(preprocess(picture, *model.config.size)))
            size = picture.shape[:2]
            results.add(path, Result(score.item(), smoothed.numpy()[0, 0], size, thresholds, picture, path))
    if results.errors < len(images):
        print(f"可视化图在{output}下")
    return 2 if results.errors else 0


def choose_thresholds(args: argparse.Namespace, checkpoint: Path, config: Config) -> Thresholds:
    """Image and pixel threshold: each from its option, else as stored (and it is said), else the published one.

    `min_area` is that of the config, that of the model; an option says otherwise.

    Raises:
        UserError: the stored thresholds are needed and damaged.
    """
    stored = load_thresholds(checkpoint, config) if None in (args.image_threshold, args.pixel_threshold) else None
    thresholds = replace(stored or PUBLISHED_THRESHOLDS, min_area=config.min_area)
    thresholds = thresholds.or_given(args.image_threshold, args.pixel_threshold, args.min_area)
    if stored:
        print(f"thresholds: {thresholds.describe()}; {checkpoint.parent / FILE_NAME}")
    return thresholds


if __name__ == "__main__":
    run_main(main)
