"""Figures, goals, and the table made of them. Pure functions; times are in seconds, memory in bytes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

OURS = "ours"
PUBLISHED = "published, defaults"
TUNED = "published, tuned"
ANOMALIB = "anomalib"
ANOMALIB_NARROW = "anomalib, ratio 1.0"
CONTENDERS = (OURS, PUBLISHED, TUNED, ANOMALIB, ANOMALIB_NARROW)  # in the order of the tables' columns
QUIET_SHARE = 0.05  # of the machine's time for other processes; above it figures are not to be quoted

Unit = Literal["s", "images/s", "bytes"]


@dataclass(frozen=True)
class Figure:
    """One measurement of all contenders.

    samples: by contender, one number a turn (the median of the turn's calls).
    group: figures of one group stand in one table; those with an `x` are also drawn as curves.
    """

    key: str
    group: str
    title: str
    unit: Unit
    samples: dict[str, list[float]]
    x: float | None = None

    def median(self, name: str) -> float | None:
        """Of a contender's samples; None if it was not measured."""
        return statistics.median(self.samples[name]) if self.samples.get(name) else None


@dataclass(frozen=True)
class Goal:
    """What ours takes for `key`, over what `other` takes if there is one, must be at most `limit`."""

    text: str
    key: str
    limit: float
    other: str | None = None
    other_key: str | None = None  # where it is not the same figure


GOALS = (
    *(
        Goal(f"{step} {text}", f"step/{kind}/{batch}", limit, other)
        for batch in (8, 32)
        for kind, step, against_anomalib in (
            ("cached", f"training step, batch {batch}, features cached:", 0.8),
            ("backbone", f"training step, batch {batch}, with the backbone:", 0.9),
        )
        for text, limit, other in (
            (f"at most {against_anomalib} of anomalib's", against_anomalib, ANOMALIB),
            ("at most 1/8 of the published graph's at Paddle's defaults", 1 / 8, PUBLISHED),
            ("at most 1/3.5 of the published graph's in the best environment", 1 / 3.5, TUNED),
        )
    ),
    *(
        Goal(
            f"OpenVINO {how}, batch {batch}: at most 0.8 of anomalib's in OpenVINO",
            f"inference/OpenVINO {how}/{batch}",
            0.8,
            ANOMALIB,
        )
        for how in ("fp32", "fp32 --winograd", "bf16")
        for batch in (1, 8)
    ),
    Goal("epoch of bottle with evaluation: at most 1/7 of the published way's at defaults", "epoch", 1 / 7, PUBLISHED),
    Goal("evaluation of 83 maps: at most 0.5 s", "evaluation/83", 0.5),
    Goal("evaluation of 83 maps: at most 1/10 of the published way's", "evaluation/83", 1 / 10, TUNED),
    Goal("200 pictures, from the command to the exported model: at most 180 s", "model", 180),
    Goal("peak memory of a bottle training: at most 3 GB", "memory/train.py", 3e9),
    Goal("peak memory of a step of configs/paper/deit.yaml, batch 8: at most 6 GB", "paper/deit/memory", 6e9),
    Goal(
        "cold start of deploy/infer.py on one picture: at most 1.3 of `import paddle`",
        "start/infer",
        1.3,
        OURS,
        "start/paddle",
    ),
    Goal(
        "deploy/score.py, one actor: at least 0.9 of the pictures a second of deploy/infer.py",
        "scoring/infer",
        1 / 0.9,
        OURS,
        "scoring/actors1",
    ),
    Goal(
        "memory of its driver, the long list: at most 1.5 of the short one", "memory/list1", 1.5, OURS, "memory/list0"
    ),
)


def check_goals(figures: Sequence[Figure], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """What each goal that was measured came to: `text`, `value` (a ratio, or seconds or bytes), `limit`, `met`."""
    by_key = {figure.key: figure for figure in figures}
    checked = []
    for goal in goals:
        value = by_key[goal.key].median(OURS) if goal.key in by_key else None
        if value is not None and goal.other:
            figure = by_key.get(goal.other_key or goal.key)
            others = figure.samples.get(goal.other) if figure else None
            value = ratio(by_key[goal.key].samples[OURS], others) if others else None
        if value is not None:
            checked.append({"text": goal.text, "value": value, "limit": goal.limit, "met": value <= goal.limit})
    return checked


def ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """The median over the turns, which the drift of the machine hits alike; of unequal numbers, that of the medians."""
    if len(samples) == len(others):
        return statistics.median(a / b for a, b in zip(samples, others, strict=True))
    return statistics.median(samples) / statistics.median(others)


def summary(figure: Figure) -> dict[str, Any]:
    """A figure as JSON: samples, median, quartiles and, for the others, how many times better ours is."""
    ours = figure.median(OURS)
    results = {}
    for name, samples in figure.samples.items():
        median = statistics.median(samples)
        results[name] = {"samples": samples, "median": median, "quartiles": list(quartiles(samples))}
        if ours and name != OURS:
            results[name]["ours_is_better_by"] = ours / median if figure.unit == "images/s" else median / ours
    return {"group": figure.group, "title": figure.title, "unit": figure.unit, "x": figure.x, "results": results}


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; of one sample, the sample itself."""
    if len(samples) < 2:
        return samples[0], samples[0]
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return lower, upper


def markdown(results: dict[str, Any]) -> str:
    """The report: goals, one table for each group of figures, what was compared, the machine.

    Args:
        results: the content of results.json.
    """
    machine = results["machine"]
    lines = [
        "# Benchmark",
        "",
        f"{results['date']}, {machine['cpu']}, {results['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, {machine['system']}. "
        f"Other processes took {results['others_share']:.0%} of the machine's time meanwhile.",
        f"Pictures: {results['data']}; backbone weights: {results['weights']}. No GPU was used.",
        "",
        "Each cell: median (lower to upper quartile), then how many times better ours is. "
        "A number without quartiles was measured once.",
        "",
        *(
            ["**The machine was not quiet: do not quote these figures.**", ""]
            if results["others_share"] > QUIET_SHARE
            else []
        ),
        "## Goals",
        "",
        "| goal | measured | limit | met |",
        "|---|---|---|---|",
    ]
    for goal in results["goals"]:
        measured, limit = (_goal_number(goal[key], goal["limit"]) for key in ("value", "limit"))
        lines.append(f"| {goal['text']} | {measured} | {limit} | {'yes' if goal['met'] else '**no**'} |")
    for group in dict.fromkeys(figure["group"] for figure in results["figures"].values()):
        lines += ["", f"## {group}", "", *_table([f for f in results["figures"].values() if f["group"] == group])]
    lines += ["", "## What was compared", ""]
    for name, contender in results["contenders"].items():
        lines.append(f"* **{name}**: {contender['description']}")
        lines.append(f"  ({', '.join(_flat(contender['process']))})")
    lines += [f"* left out: {reason}" for reason in results["left_out"]]
    difference = results["largest_loss_difference"]
    lines += ["", f"First losses of ours and the published graph differ by at most {difference:.1e}, relatively."]
    return "\n".join(lines) + "\n"


def _table(figures: list[dict[str, Any]]) -> list[str]:
    names = [name for name in CONTENDERS if any(name in figure["results"] for figure in figures)]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for figure in figures:
        cells = [_cell(figure["results"].get(name), figure["unit"]) for name in names]
        lines.append(f"| {figure['title']} | {' | '.join(cells)} |")
    return lines


def _cell(result: dict[str, Any] | None, unit: Unit) -> str:
    if result is None:
        return "–"
    text = number(result["median"], unit)
    if len(result["samples"]) > 1:
        lower, upper = (number(value, unit) for value in result["quartiles"])
        text += f" ({lower} to {upper})"
    if "ours_is_better_by" in result:
        text += f", {result['ours_is_better_by']:.2f}x"
    return text


def number(value: float, unit: Unit) -> str:
    """With three digits and its unit."""
    if unit == "images/s":
        return f"{value:.3g} /s"
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB"
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _goal_number(value: float, limit: float) -> str:
    """A goal's value as its limit says what it is: bytes, or a ratio or seconds."""
    return number(value, "bytes") if limit > 1e6 else f"{value:.3f}"


def _flat(values: dict[str, Any]) -> list[str]:
    """Nested dictionaries as `name=value` texts."""
    texts = []
    for name, value in values.items():
        texts += _flat(value) if isinstance(value, dict) else [f"{name}={value}"]
    return texts
