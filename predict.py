"""Look at pictures: python predict.py --category bottle --image_path images/bottle_good.png --exp_dir exp"""

import argparse
from dataclasses import replace
from pathlib import Path

from deploy.common.cli import UserError, add_pictures, report_error, run_main
from deploy.common.imaging import (
    PictureReader,
    decision_line,
    draw_result,
    drawing_paths,
    list_images,
    preprocess,
    write_picture,
)
from utils.options import add_category, common_parser, prepare
from utils.results import category_folder
from utils.thresholds import FILE_NAME, PUBLISHED_THRESHOLDS, Thresholds, load_thresholds


def parse_args() -> argparse.Namespace:
    parser = common_parser("Score pictures and draw where their defects are.")
    add_category(parser, "category whose checkpoint is used")
    add_pictures(parser, "what eval.py stored beside the checkpoint, else the published 0.8")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    images = list_images(args.image_path)
    config = prepare(args)

    import paddle

    from utils.checkpoint import load_model, white_level_of

    folder = category_folder(args.exp_dir, args.category)
    model, checkpoint = load_model(config, folder / "best.pdparams")
    thresholds = choose_thresholds(args, folder / "best.pdparams")
    read = PictureReader(white_level_of(checkpoint, config))
    single = Path(args.image_path).is_file()
    output = folder if single else folder / "predictions"
    drawings = drawing_paths(images, output)
    done = 0
    for path in images:
        try:
            picture = read(path)
            batch = preprocess(picture, *config.size)
            with paddle.no_grad():
                _, smoothed, score = model(paddle.to_tensor(batch))
            drawing = draw_result(picture, smoothed.numpy()[0, 0], score.item(), thresholds.image, thresholds.pixel)
            write_picture(folder / "result.jpg" if single else drawings[path], drawing)
            print(decision_line(score.item(), thresholds.image, None if single else path), flush=True)
            done += 1
        except UserError as error:
            report_error(error)  # the other pictures still count
    if done:
        print(f"可视化图在{output}下")
    return 0 if done == len(images) else 2


def choose_thresholds(args: argparse.Namespace, checkpoint: Path) -> Thresholds:
    """Image and pixel threshold: each from its option, else as stored (and it is said), else the published one.

    Raises:
        UserError: the stored thresholds are needed and damaged.
    """
    given = {}
    if args.image_threshold is not None:
        given |= {"image": args.image_threshold, "rule": "--image_threshold"}
    if args.pixel_threshold is not None:
        given |= {"pixel": args.pixel_threshold, "pixel_rule": "--pixel_threshold"}
    stored = None if {"image", "pixel"} <= given.keys() else load_thresholds(checkpoint)
    thresholds = replace(stored or PUBLISHED_THRESHOLDS, **given)
    if stored:
        print(f"thresholds: {thresholds.describe()}; {checkpoint.parent / FILE_NAME}")
    return thresholds


if __name__ == "__main__":
    run_main(main)
