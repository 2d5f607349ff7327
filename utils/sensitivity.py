"""What a model can find: the share of drawn defects whose pictures score above the threshold, by size and contrast.

The defects (`datasets.drawn_defects`) are drawn on good pictures that training did not use, as large as they are in
their files, and the pictures are then resized like all others: what is lost on the way to the model is lost here too.
Sizes are multiples of a pixel of the model's input; one such pixel is sqrt(h w / (H W)) pixels of an (h, w) picture.
Pictures that are above the threshold without a defect are left out, so that what is found is found by the defect.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from datasets.drawn_defects import KINDS, draw_defect
from deploy.common.cli import UserError, warn
from deploy.common.decisions import Thresholds
from deploy.common.files import regular_file, sha256, write_text
from deploy.common.imaging import normalise, resize
from utils.plots import blank_figure, write_figure

if TYPE_CHECKING:
    from models.fastflow import FastFlow  # imports paddle, which scripts must set up before

FILE_NAME = "sensitivity.json"
SIZES = (2, 4, 8, 12, 16, 24, 32, 64)  # pixels of the model's input
CONTRASTS = (0.1, 0.2, 0.4)
CLEAR = 0.2  # the line is about this contrast and more, and names the others faint
DRAWINGS = 3  # of each size, contrast and kind; all of them are 288 pictures to score
PICTURES = 48  # at most, that are drawn on
PROMISED = "promised"  # what the false alarm rate is where the threshold's rule gives it
ENOUGH = 0.9  # the share that the line is about: 9 of 10
BATCH = 8  # pictures a pass
EXAMPLE = (16, 0.4)  # size and contrast of those that are shown


@dataclass(frozen=True)
class Sensitivity:
    """`content` is what sensitivity.json holds; `examples` are details of drawn pictures, (h, w, 3) uint8, by kind."""

    content: dict[str, Any]
    examples: dict[str, np.ndarray]


def measure_sensitivity(
    model: "FastFlow",
    held_out: Sequence[Path],
    scores: np.ndarray,
    thresholds: Thresholds,
    false_alarm_rate: float | None,
    read: Callable[[Path], np.ndarray],
) -> Sensitivity:
    """Draw defects on good pictures and count those that are found.

    Args:
        model: in any mode; it is in eval mode afterwards.
        held_out: good pictures that its training did not use.
        scores: (N,), their image scores.
        thresholds: the image threshold decides.
        false_alarm_rate: that the threshold promises; None: it is the share of `held_out` above it.
        read: gives a picture, (h, w, 3) uint8 RGB.

    Returns:
        the same for the same arguments: the generator's seed is that of the model's config.

    Raises:
        UserError: all pictures are above the threshold, or one cannot be read.
    """
    config = model.config
    rng = np.random.default_rng(config.seed)
    usable = [path for path, score in zip(held_out, scores, strict=True) if score <= thresholds.image]
    if not usable:
        raise UserError(
            f"{held_out[0].parent}: all {len(held_out)} held-out pictures are above the image threshold "
            f"{thresholds.describe()}, so drawn defects say nothing; another threshold rule (quantile) may help"
        )
    cases = [
        (size, contrast, kind)
        for size in SIZES
        for contrast in CONTRASTS
        for kind in KINDS
        for _ in range(min(DRAWINGS, len(usable)))
    ]
    chosen = [usable[i] for i in rng.permutation(len(usable))[:PICTURES]]
    shares = np.array_split(rng.permutation(len(cases)), len(chosen))
    found: list[bool | None] = [None] * len(cases)  # None: it could not be drawn
    lengths, examples, waiting = [], {}, []

    def score_waiting() -> None:
        if waiting:
            results = _scores(model, np.stack([picture for _, picture in waiting]))
            for (index, _), score in zip(waiting, results, strict=True):
                found[index] = bool(score > thresholds.image)
            waiting.clear()

    other = read(chosen[-1])
    with tqdm(total=len(cases), desc="drawn defects", unit="image", disable=None, leave=False) as bar:
        for path, share in zip(chosen, shares, strict=True):
            picture = read(path)
            lengths.append(picture.shape[:2])
            pixel = _pixel(picture.shape[:2], config.size)
            for index in share:
                size, contrast, kind = cases[index]
                drawing = draw_defect(rng, picture, other, kind, max(size * pixel, 1), contrast)
                if drawing:
                    waiting.append((index, resize(drawing[0], *config.size)))
                    if (size, contrast) == EXAMPLE or kind not in examples:
                        examples[kind] = _detail(*drawing)
                if len(waiting) == BATCH:
                    score_waiting()
                bar.update()
            other = picture
        score_waiting()
    height, width = (round(float(length)) for length in np.median(lengths, axis=0))
    counted = [(case, hit) for case, hit in zip(cases, found, strict=True) if hit is not None]
    content = {
        "drawn_defects": len(counted),
        "held_out_pictures": len(held_out),
        "above_threshold_undrawn": len(held_out) - len(usable),
        "picture_size": [height, width],
        "input_size": list(config.size),
        "image_threshold": thresholds.image,
        "rule": thresholds.rule,
        "false_alarm_rate": 1 - len(usable) / len(held_out) if false_alarm_rate is None else false_alarm_rate,
        "rate_is": "measured on the held-out pictures" if false_alarm_rate is None else PROMISED,
        "seed": config.seed,
        "by_size": [
            {
                "input_px": size,
                "picture_px": max(size * _pixel((height, width), config.size), 1),
                **_count(counted, lambda case, size=size: case[0] == size),
                "by_contrast": {
                    str(contrast): _count(counted, lambda case, one=(size, contrast): case[:2] == one)
                    for contrast in CONTRASTS
                },
                "by_kind": {kind: _count(counted, lambda case, one=(size, kind): case[::2] == one) for kind in KINDS},
            }
            for size in SIZES
        ],
    }
    content["found_from_px"] = found_from(content["by_size"], [c for c in CONTRASTS if c >= CLEAR])
    content["faint_found_from_px"] = found_from(content["by_size"], [c for c in CONTRASTS if c < CLEAR])
    content["line"] = sensitivity_line(content)
    return Sensitivity(content, examples)


def _scores(model: "FastFlow", pictures: np.ndarray) -> np.ndarray:
    """Image scores (B,) of pictures (B, H, W, 3) uint8."""
    import paddle

    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(normalise(pictures)))[2].numpy()


def _pixel(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """Side of the square of a picture (h, w) that becomes as much as a pixel of the input (H, W)."""
    return float(np.sqrt(np.prod(picture) / np.prod(size)))


def _detail(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The defect and as much again around it."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    reach = max(np.ptp(rows), np.ptp(columns)) + 1
    top, left = (max(int(places.mean()) - reach, 0) for places in (rows, columns))
    return picture[top : top + 2 * reach + 1, left : left + 2 * reach + 1].copy()


def _count(counted: Sequence[tuple[tuple, bool]], holds: Callable[[tuple], bool]) -> dict[str, int]:
    """How many of the cases were drawn, and found."""
    hits = [hit for case, hit in counted if holds(case)]
    return {"drawn": len(hits), "found": sum(hits)}


def found_from(by_size: Sequence[Mapping[str, Any]], contrasts: Sequence[float]) -> float | None:
    """The smallest size, in pixels of the pictures, from which on a share of `ENOUGH` is found; None: there is none.

    The shares are first made to rise with the size, as those nearest to the measured ones that do (isotonic regression
    by pooling neighbours that fall; Barlow and Brunk 1972, doi 10.1080/01621459.1972.10481216): chance in one size
    then counts for less.

    Args:
        by_size: rising; of each `picture_px`, and `drawn` and `found` by the contrast as text.
        contrasts: those that count.
    """
    pools: list[list[float]] = []  # first size, drawn, found
    for row in by_size:
        counts = [row["by_contrast"][str(contrast)] for contrast in contrasts]
        drawn, found = (sum(count[key] for count in counts) for key in ("drawn", "found"))
        if not drawn:
            continue
        pools.append([row["picture_px"], drawn, found])
        while len(pools) > 1 and pools[-1][2] * pools[-2][1] < pools[-2][2] * pools[-1][1]:
            _, drawn, found = pools.pop()
            pools[-1][1] += drawn
            pools[-1][2] += found
    return next((first for first, drawn, found in pools if found >= ENOUGH * drawn), None)


def sensitivity_line(content: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    size, faint = content["found_from_px"], content["faint_found_from_px"]
    largest = max((row["picture_px"] for row in content["by_size"] if row["drawn"]), default=0)
    of = f"(of {max(content['picture_size'])} px)"
    sizes = f"no size up to {largest:.0f} px {of}" if size is None else f"{size:.0f} px {of} and more"
    rate = f"{content['false_alarm_rate']:.2g}" + f", {content['rate_is']}" * (content["rate_is"] != PROMISED)
    if size is None:
        fainter = ""
    elif faint is None:
        fainter = f"; fainter ones of no size up to {largest:.0f} px"
    else:
        fainter = f"; fainter ones from {faint:.0f} px on"
    return (
        f"spots of {sizes} are found in 9 of 10 cases at a false alarm rate of {rate} "
        f"(drawn ones, of contrast {CLEAR} and more{fainter})"
    )


def short_form(content: Mapping[str, Any]) -> dict[str, Any]:
    """What eval.json holds of it."""
    keys = (
        "found_from_px",
        "faint_found_from_px",
        "picture_size",
        "false_alarm_rate",
        "drawn_defects",
        "held_out_pictures",
        "line",
    )
    shares = {
        f"{row['picture_px']:.4g}": row["found"] / row["drawn"] if row["drawn"] else None for row in content["by_size"]
    }
    return {**{key: content[key] for key in keys}, "share_found_by_px": shares}


def sensitivity_table(content: Mapping[str, Any]) -> list[list[str]]:
    """Titles and a line for each size, as cells: found of drawn, by contrast and by kind."""

    def cell(count: Mapping[str, int]) -> str:
        return f"{count['found']} of {count['drawn']}" if count["drawn"] else "-"

    table = [["size in px", "of the input", *(f"contrast {c}" for c in CONTRASTS), *KINDS, "all"]]
    for row in content["by_size"]:
        parts = [*row["by_contrast"].values(), *row["by_kind"].values(), row]
        table.append([f"{row['picture_px']:.0f}", f"{row['input_px']}", *map(cell, parts)])
    return table


def print_sensitivity(name: str, content: Mapping[str, Any]) -> None:
    """The table, and the line of the category of this name."""
    table = sensitivity_table(content)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print(f"{name}: {content['line']}")


def write_sensitivity(measured: Sensitivity, checkpoint: Path) -> None:
    """Write sensitivity.json, bound to the checkpoint by its SHA-256, and sensitivity.png beside it.

    Raises:
        UserError: a file cannot be written.
    """
    content = {**measured.content, "checkpoint": checkpoint.name, "sha256": sha256(checkpoint)}
    write_text(checkpoint.parent / FILE_NAME, json.dumps(content, indent=2) + "\n")
    draw_sensitivity(checkpoint.parent / "sensitivity.png", measured)


def load_sensitivity(checkpoint: Path, image_threshold: float) -> dict[str, Any] | None:
    """What was measured of this checkpoint with this threshold before; None if nothing was."""
    path = checkpoint.parent / FILE_NAME
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
        sensitivity_table(content), short_form(content)  # fail where it is not what they take
        same = content["sha256"] == sha256(checkpoint) and abs(content["image_threshold"] - image_threshold) < 1e-6
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warn(f"{path}: is damaged ({error}) and not used; eval.py --sensitivity writes it anew")
        return None
    return content if same else None


def draw_sensitivity(path: Path, measured: Sensitivity) -> None:
    """The shares over the size, by contrast and by kind, and an example of each kind.

    Raises:
        UserError: it cannot be written.
    """
    rows = measured.content["by_size"]
    sizes = [row["picture_px"] for row in rows]
    picture = blank_figure(11, 6)
    half = len(KINDS)
    places = picture.subplot_mosaic([["contrast"] * half + ["kind"] * half, [kind for kind in KINDS for _ in range(2)]])

    def shares(counts: Sequence[Mapping[str, int]]) -> list[float]:
        return [count["found"] / count["drawn"] if count["drawn"] else np.nan for count in counts]

    for by, label in (("contrast", "contrast {}"), ("kind", "{}")):
        axes = places[by]
        for name in rows[0][f"by_{by}"]:
            axes.plot(sizes, shares([row[f"by_{by}"][name] for row in rows]), marker=".", label=label.format(name))
        axes.plot(sizes, shares(rows), "k", linewidth=2, label="all")
        axes.axhline(ENOUGH, color="grey", linestyle=":")
        axes.set(xlabel="size in px of the pictures", ylabel="share found", xscale="log", ylim=(-0.03, 1.03))
        axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.legend(loc="lower right", fontsize="small")
        axes.grid(alpha=0.3)
    for kind in KINDS:
        places[kind].axis("off")
        if kind in measured.examples:
            places[kind].imshow(measured.examples[kind])
            places[kind].set_title(f"{kind} (drawn)")
    write_figure(path, picture)
