"""Curves of how times grow."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks.report import CONTENDERS, Figure, quartiles
from deploy.common.files import write_whole

# file name: key prefix of the figures, or whole key; label of the x axis
CURVES = {
    "growth_size": ("size", "side of a picture [pixels]", "training step, batch 8, with the backbone"),
    "growth_threads": ("threads", "threads", "training step, batch 8, with the backbone"),
    "growth_pictures": ("epoch", "training pictures (and 2/5 as many test pictures)", "first epoch with evaluation"),
    "growth_tiles": ("tiles", "side of a picture [pixels]", "one picture in tiles of 256, deploy/infer.py in OpenVINO"),
    "growth_evaluation": ("evaluation", "anomaly maps", "evaluation to both AUROCs"),
}


def draw_curves(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Draw what was measured at two points or more; the files."""
    written = []
    for name, (prefix, label, title) in CURVES.items():
        points = [f for f in figures if f.x is not None and f.key.partition("/")[0] == prefix]
        if len(points) > 1:
            path = folder / f"{name}.png"
            write_whole(path, lambda target, p=points, x=label, t=title: _draw(p, x, t, target))
            written.append(path)
    return written


def _draw(points: Sequence[Figure], label: str, title: str, target: str) -> None:
    """Medians as curves with quartiles as bars, both axes logarithmic: proportional growth is a straight slope."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, name in enumerate(CONTENDERS):
        measured = [point for point in points if name in point.samples]
        medians = [point.median(name) for point in measured]
        spread = [quartiles(point.samples[name]) for point in measured]
        errors = [
            [median - low for median, (low, _) in zip(medians, spread, strict=True)],
            [high - median for median, (_, high) in zip(medians, spread, strict=True)],
        ]
        if measured:
            style = {"color": f"C{colour}", "marker": "o", "capsize": 3, "label": name}
            axes.errorbar([point.x for point in measured], medians, yerr=errors, **style)
    ticks = [point.x for point in points]
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds", title=title)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)
