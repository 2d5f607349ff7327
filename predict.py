"""Look at pictures: python predict.py --category bottle --image_path images/bottle_good.png --exp_dir exp"""

import argparse
from pathlib import Path

from deploy.common.cli import UserError, add_pictures, run_main
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Results, Thresholds
from deploy.common.imaging import PictureReader, drawing_paths, list_images, preprocess
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
    published = single and not args.output_dir
    drawings = {images[0]: output / "result.jpg"} if published else drawing_paths(images, output)
    with Results(images, thresholds, drawings, args.save_json) as results:
        for path in images:
            try:
                picture = read(path)
            except UserError as error:
                results.fail(path, error)
                continue
            with paddle.no_grad():
                _, smoothed, score = model(paddle.to_tensor(preprocess(picture, *model.config.size)))
            results.add(path, score.item(), smoothed.numpy()[0, 0], picture)
    if results.errors < len(images):
        print(f"可视化图在{output}下")
    return 2 if results.errors else 0


def choose_thresholds(args: argparse.Namespace, checkpoint: Path, config: Config) -> Thresholds:
    """Image and pixel threshold: each from its option, else as stored (and it is said), else the published one.

    Raises:
        UserError: the stored thresholds are needed and damaged.
    """
    stored = load_thresholds(checkpoint, config) if None in (args.image_threshold, args.pixel_threshold) else None
    thresholds = (stored or PUBLISHED_THRESHOLDS).or_given(args)
    if stored:
        print(f"thresholds: {thresholds.describe()}; {checkpoint.parent / FILE_NAME}")
    return thresholds


if __name__ == "__main__":
    run_main(main)
