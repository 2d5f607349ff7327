"""What eval.py prints and leaves behind: eval.json, eval.csv, eval.md, and pictures and maps of each category."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.mvtec import GroundTruth
from deploy.common.cli import printable, warn
from deploy.common.files import alone, write_text, write_whole
from deploy.common.imaging import draw_result, read_rgb, write_picture
from utils.metrics import roc_curve
from utils.plots import blank_figure, write_figure
from utils.results import describe_backbone, describe_selection, figure, published_line, rounded
from utils.thresholds import Thresholds

if TYPE_CHECKING:
    from utils.evaluation import Scores  # imports paddle, which scripts must set up before

Row = Mapping[str, Any]  # one category's entry in eval.json

# The figures that are averaged over categories, in the order of the tables; the published two first.
TITLES = {
    "pixel_auroc": "pixel auroc",
    "image_auroc": "image auroc",
    "image_ap": "image ap",
    "pixel_ap": "pixel ap",
    "image_f1_max": "image f1-max",
    "pixel_f1_max": "pixel f1-max",
    "aupro": "aupro",
}
BY_DEFECT = ("pixel_auroc", "image_auroc", "aupro")  # which of them each defect's folder has too
PUBLISHED_MEANS = {  # means over MVTec AD's 15 categories
    "published reproduction": {"pixel_auroc": 0.972, "image_auroc": 0.980},
    "paper": {"pixel_auroc": 0.972, "image_auroc": 0.979},
}


# ---- figures


def means(rows: Mapping[str, Row]) -> dict[str, float | None]:
    """Each figure averaged over the categories where it could be measured."""
    mean = {}
    for key in TITLES:
        measured = [row[key] for row in rows.values() if row.get(key) is not None]
        mean[key] = float(np.mean(measured)) if measured else None
    return mean


def print_results(rows: Mapping[str, Row], all_metrics: bool) -> None:
    """What the figures were measured with; if asked for, tables of all of them; last the published lines.

    These are pixel and image AUROC of each category and of `all`, the mean of the rounded figures.
    """
    for line in provenance(rows):
        print(line)
    if all_metrics:
        width = max(len(name) for name in [*rows, "category"])
        print("  ".join([f"{'category':<{width}}", *TITLES.values()]))
        for name, row in [*rows.items(), ("mean", means(rows))]:
            cells = [f"{figure(row.get(key)):>{len(title)}}" for key, title in TITLES.items()]
            print("  ".join([f"{name:<{width}}", *cells]))
        table = defect_table(rows, figure)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            aligned = zip(cells, "<<>>>>", widths, strict=True)
            print("  ".join(f"{cell:{side}{width}}" for cell, side, width in aligned))
        for line in defect_notes(rows):
            print(line)
        for line in region_lines(rows):
            print(line)
    mean = means({name: {key: rounded(row.get(key)) for key in TITLES} for name, row in rows.items()})
    for name, row in {**rows, "all": mean}.items():
        print(published_line(name, row["pixel_auroc"], row["image_auroc"]))


def defect_table(rows: Mapping[str, Row], text: Callable[[float | None], str]) -> list[list[str]]:
    """Titles and a line for each defect's folder, as cells; nothing where no category has any.

    `text` writes a figure. `missed`: so many of its pictures are not above the image threshold, of so many.
    """
    lines = [
        [
            *(printable(name), printable(defect), *(text(figures[key]) for key in BY_DEFECT)),
            f"{figures['missed_defects']} of {figures['defect_test_pictures']}",
        ]
        for name, row in rows.items()
        for defect, figures in row.get("defects", {}).items()
    ]
    return [["category", "defect", *(TITLES[key] for key in BY_DEFECT), "missed"], *lines] if lines else []


def defect_notes(rows: Mapping[str, Row]) -> list[str]:
    """The foot of the figures by defect: the thresholds that `missed` stands for, and why figures are n/a."""
    known = {name: row for name, row in rows.items() if row.get("defects")}

    def threshold(row: Row) -> str:
        return f"not above the image threshold {row['decisions']['image']:.3f} ({row['decisions']['rule']})"

    lines = _alike("missed", known, threshold) if known else []
    for reason, holds in (
        (
            "image auroc n/a: no good picture to compare with",
            lambda figures: figures["image_auroc"] is None and figures["defect_test_pictures"],
        ),
        ("pixel auroc and aupro n/a: no masks", lambda figures: not figures["images_with_mask"]),
        (
            "n/a: no pixel of the defect is left of any of its masks (mask_rule)",
            lambda figures: figures["images_with_mask"] and figures["pixel_auroc"] is None,
        ),
    ):
        names = []
        for name, row in known.items():
            concerned = [defect for defect, figures in row["defects"].items() if holds(figures)]
            whole = len(concerned) == len(row["defects"])
            names += [name] if whole else [f"{name}/{defect}" for defect in concerned]
        if names:
            lines.append(f"{reason}: {printable(', '.join(names))}")
    return lines


def region_lines(rows: Mapping[str, Row]) -> list[str]:
    """A line for each category on how the regions that are found meet the true ones, or why nobody knows."""
    lines = []
    for name, row in rows.items():
        if "regions" not in row:
            continue
        if regions := row["regions"]:
            text = (
                f"{regions['hit']} of {regions['true']} true ones hit, {regions['false']} of {regions['found']} found "
                f"ones false ({regions['false_per_picture']:.2f} a picture); above the pixel threshold "
                f"{row['decisions']['pixel']:.3f}, of {regions['min_area']} pixels or more"
            )
        else:
            text = "not counted: defects without masks" if row["images"] else "not counted: no test pictures"
        lines.append(f"regions of {printable(name)}: {text}")
    return lines


def provenance(rows: Mapping[str, Row]) -> list[str]:
    """The foot of a table: what its figures were measured with and on; a line for each difference."""
    known = {name: row for name, row in rows.items() if {"checkpoint", "backbone"} <= row.keys()}
    pictures = [sum(row.get(key) or 0 for row in known.values()) for key in ("images", "anomalous_images")]
    epochs = ", ".join(f"{name} {describe_epoch(row)}" for name, row in known.items())
    return [
        *_alike("backbone weights", known, lambda row: describe_backbone(row["backbone"])),
        *_alike("selection", known, lambda row: describe_selection(row.get("selection"))),
        *_alike("checkpoint", known, lambda row: Path(row["checkpoint"]).name),
        f"epoch: {epochs}",
        f"test pictures: {pictures[0]}, {pictures[1]} of them with a defect",
    ]


def describe_epoch(row: Row) -> str:
    """The epoch of a category's checkpoint, counted from 1, and what a published file says, which counts from 0."""
    epoch, in_file = row.get("epoch"), row.get("epoch_in_file")
    return f"{epoch}" if in_file in (None, epoch) else f"{epoch} ({in_file} in the published file, which counts from 0)"


def _alike(title: str, rows: Mapping[str, Row], describe: Callable[[Row], str]) -> list[str]:
    """`title: text`; where the categories differ, a line for each text with its categories."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        names.setdefault(describe(row), []).append(name)
    if len(names) == 1:
        return [f"{title}: {text}" for text in names]
    return [f"{title}: {text} ({', '.join(of)})" for text, of in names.items()]


def write_results(folder: Path, results: Mapping[str, Row]) -> None:
    """Write eval.json, eval.csv and eval.md; categories that eval.json holds already and are not in `results` stay.

    Of several processes that do so at once one waits for the other.

    Raises:
        UserError: a file cannot be written.
    """
    with alone(folder / ".eval.lock"):
        rows = {**_read_rows(folder / "eval.json"), **results}
        content = {"mean": means(rows), "categories": rows}
        write_text(folder / "eval.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / "eval.csv", csv_table(rows))
        write_text(folder / "eval.md", markdown_table(folder.name, rows))
    print(f"written to {folder / 'eval.json'}, with eval.csv and eval.md beside it")


def _read_rows(path: Path) -> dict[str, Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["categories"]
        csv_table(rows), markdown_table("", rows)  # fail where they are not what it takes
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warn(f"{path}: is damaged ({error}) and written anew")
        return {}
    return rows


def csv_table(rows: Mapping[str, Row]) -> str:
    """One line a category with full precision, empty where nothing was measured; then mean and published means."""
    keys = [*TITLES, "image_f1_threshold", "pixel_f1_threshold", "selection", "checkpoint", "epoch", "backbone"]
    keys += ["images", "anomalous_images", "images_with_mask"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["category", *keys], lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    for name, row in rows.items():
        backbone = describe_backbone(row["backbone"]) if "backbone" in row else ""
        writer.writerow({"category": name, **row, "backbone": backbone})
    for name, row in {"mean": means(rows), **PUBLISHED_MEANS}.items():
        writer.writerow({"category": name, **row})
    return text.getvalue()


def markdown_table(experiment: str, rows: Mapping[str, Row]) -> str:
    """The table in percent, with the mean, the published means to compare it with, and its provenance.

    Then the figures by defect, where there are any.
    """

    def percent(value: float | None, digits: int = 2) -> str:
        return "n/a" if value is None else f"{100 * value:.{digits}f}"

    def cells(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |\n"

    def line(name: str, row: Row, digits: int) -> str:
        return cells([name, *(percent(row.get(key), digits) for key in TITLES)])

    count = f"{len(rows)} categor{'y' if len(rows) == 1 else 'ies'}"
    table = cells(["category", *TITLES.values()]) + f"| :-- |{' --: |' * len(TITLES)}\n"
    table += "".join(line(name, row, 2) for name, row in rows.items())
    table += line(f"**mean of {count}**", means(rows), 2)
    table += "".join(line(f"{name}, 15 categories", row, 1) for name, row in PUBLISHED_MEANS.items())
    by_defect = ""
    if defects := defect_table(rows, percent):
        titles, *lines = map(cells, defects)
        by_defect = f"\n## By defect\n\n{titles}| :-- | :-- |{' --: |' * (len(defects[0]) - 2)}\n{''.join(lines)}\n"
        by_defect += "In percent, each with the good pictures as if there were no other defect.\n\n"
        by_defect += "".join(f"* {text}\n" for text in defect_notes(rows))
    return (
        f"# Evaluation of {experiment}\n\n{table}\n"
        "In percent. aupro: up to a false positive rate of 0.3; n/a: not measured, and left out of the mean.\n\n"
        f"The mean here is over {count}, those of the published reproduction and of the paper are over MVTec AD's 15 "
        "categories. The published best checkpoint was chosen on the test set.\n\n"
        + "".join(f"* {text}\n" for text in [*provenance(rows), *region_lines(rows)])
        + by_defect
    )


# ---- pictures and maps of one category


def draw_evaluation(
    folder: Path,
    paths: Sequence[Path],
    scores: "Scores",
    truth: GroundTruth,
    figures: Row,
    thresholds: Thresholds,
    read: Callable[[Path], np.ndarray] = read_rgb,
) -> None:
    """Draw roc.png, scores.png, highest_good.jpg and lowest_defect.jpg.

    The last two are the good picture with the highest score and the defect picture with the lowest, decided wrongly or
    not; `read` gives them, (h, w, 3) uint8 RGB. A picture that has nothing to show is removed if an earlier run drew
    it, and so are those of earlier names.

    Raises:
        UserError: a file cannot be written.
    """
    draw_roc(folder / "roc.png", scores, truth, figures)
    draw_scores(folder / "scores.png", scores, truth, thresholds)
    for name, earlier, candidates, extreme in (
        ("highest_good.jpg", "worst_false_positive.jpg", np.flatnonzero(~truth.labels), np.argmax),
        ("lowest_defect.jpg", "worst_false_negative.jpg", np.flatnonzero(truth.labels), np.argmin),
    ):
        (folder / earlier).unlink(missing_ok=True)
        if not len(candidates):
            (folder / name).unlink(missing_ok=True)
            continue
        i = candidates[extreme(scores.image[candidates])]
        mask = None if truth.masks is None else truth.masks[i]
        score = float(scores.image[i])
        drawing = draw_result(read(paths[i]), scores.pixel[i], score, thresholds.image, thresholds.pixel, mask)
        write_picture(folder / name, drawing)


def draw_roc(path: Path, scores: "Scores", truth: GroundTruth, figures: Row) -> None:
    """The ROC curves of pictures and of pixels, those that there are; `figures` holds their AUROCs."""
    curves = {"image": (scores.image, truth.labels)}
    if truth.masks is not None:
        curves["pixel"] = (scores.pixel, truth.masks)
    picture = blank_figure(5, 5)
    axes = picture.subplots()
    for name, (values, labels) in curves.items():
        curve = roc_curve(values, labels)
        if curve:
            axes.plot(*curve, label=f"{name} (AUROC {figure(figures[f'{name}_auroc'])})")
    if not axes.lines:
        path.unlink(missing_ok=True)
        return
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    write_figure(path, picture)


def draw_scores(path: Path, scores: "Scores", truth: GroundTruth, thresholds: Thresholds) -> None:
    """How the image scores of good and of defect pictures are distributed, with the threshold; the legend beside it."""
    if not len(scores.image):
        path.unlink(missing_ok=True)
        return
    picture = blank_figure(9, 4)
    axes = picture.subplots()
    low, high = float(scores.image.min()), float(scores.image.max())
    bins = np.linspace(low, max(high, low + 0.01), 31)  # wide enough for three decimals
    for name, of in (("good", ~truth.labels), ("defect", truth.labels)):
        axes.hist(scores.image[of], bins, alpha=0.6, label=f"{name}: {of.sum()} pictures")
    label = f"threshold {thresholds.image:.3f} ({thresholds.rule})"
    axes.axvline(thresholds.image, color="black", linestyle=":", label=label)
    axes.set(xlabel="image score", ylabel="pictures")
    axes.yaxis.get_major_locator().set_params(integer=True)
    picture.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    write_figure(path, picture)


def save_maps(path: Path, paths: Sequence[Path], scores: "Scores", truth: GroundTruth) -> None:
    """Write all that the figures of eval.json are made of, for numpy.load.

    `smoothed` (N, H, W) float32, `image_scores` (N,) float32, `labels` (N,) bool, `masks` (N, H, W) bool (not there
    where some defect has no mask), `paths` (N,) str.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {
        "smoothed": scores.pixel,
        "image_scores": scores.image,
        "labels": truth.labels,
        "paths": np.array([str(picture) for picture in paths], dtype=str),
    }
    if truth.masks is not None:
        arrays["masks"] = truth.masks
    write_whole(path, lambda name: np.savez(name, **arrays))
