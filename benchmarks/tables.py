"""The measured tables of the documentation, made of the JSON files beside it: python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; the command writes it anew.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.inputs import ROOT
from benchmarks.measure import PAPER
from benchmarks.report import ANOMALIB_NARROW, CONTENDERS, OURS, number
from deploy.common.cli import UserError, run_main
from deploy.common.files import write_text

PAGES = {  # that hold tables, with their language
    "README.md": "zh",
    "README_en.md": "en",
    "docs/zh/accuracy.md": "zh",
    "docs/en/accuracy.md": "en",
    "docs/zh/backbones.md": "zh",
    "docs/en/backbones.md": "en",
    "benchmarks/README.md": "en",
}
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
# Rows of the table of speed: key in results.json, title.
SPEED = (
    ("step/cached/8", "training step, batch 8, features cached"),
    ("step/backbone/8", "training step, batch 8, with the backbone"),
    ("step/cached/32", "training step, batch 32, features cached"),
    ("step/backbone/32", "training step, batch 32, with the backbone"),
    ("epoch", "first epoch with evaluation, 209 + 83 pictures"),
    ("later epoch", "each later epoch"),
    ("model", "200 pictures, from the command to the exported model, each by its own recipe"),
    ("model/steps", "the same, anomalib in as many steps as ours"),
    ("evaluation/83", "evaluation of 83 maps of 256x256, model excluded"),
    ("latency", "latency of one picture"),
    ("throughput/8", "throughput, batch 8"),
)
# The same of the table of exported models, as far as the CPU can do it.
EXPORTED = tuple(
    (f"inference/{name}/{batch}", f"{title}, batch {batch}")
    for name, title in (
        ("OpenVINO fp32", "OpenVINO"),
        ("OpenVINO fp32 --winograd", "OpenVINO, `--winograd True`"),
        ("OpenVINO bf16", "OpenVINO, bfloat16"),
        ("ONNX Runtime fp32", "ONNX Runtime"),
        ("own framework fp32", "Paddle Inference; anomalib: PyTorch"),
    )
    for batch in (1, 8)
)
# What both READMEs show of these two.
OVERVIEW = {
    "en": (
        ("epoch", "first epoch with evaluation, 209 + 83 pictures"),
        ("later epoch", "each later epoch"),
        ("latency", "one picture, trained model"),
        ("inference/OpenVINO fp32/1", "one picture, exported, OpenVINO"),
        ("inference/OpenVINO fp32 --winograd/1", "the same with `--winograd True`"),
    ),
    "zh": (
        ("epoch", "第一轮训练和评估，209+83 张图片"),
        ("later epoch", "之后的每一轮"),
        ("latency", "一张图片，训练好的模型"),
        ("inference/OpenVINO fp32/1", "一张图片，导出后用 OpenVINO"),
        ("inference/OpenVINO fp32 --winograd/1", "同上，加 `--winograd True`"),
    ),
}
COLUMNS = {
    "en": (
        "ours",
        "published graph, defaults",
        "published graph, best environment",
        "anomalib 2.7, width 1.06",
        "anomalib 2.7, width 1.0",
    ),
    "zh": (
        "本仓库",
        "原复现的计算图，默认环境",
        "原复现的计算图，最佳环境",
        "anomalib 2.7，宽度 1.06",
        "anomalib 2.7，宽度 1.0",
    ),
}


def main() -> None:
    for name, language in PAGES.items():
        path = ROOT / name
        write_text(path, with_tables(path.read_text(encoding="utf-8"), language))


def with_tables(text: str, language: str) -> str:
    """The page's text with every table made anew.

    Args:
        text: of the page.
        language: `en` or `zh`.

    Raises:
        UserError: the text names a table that is not known.
    """
    makers = {
        "overview": (overview, "avx2/results.json"),
        "speed": (speed, "results.json"),
        "speed_avx2": (speed, "avx2/results.json"),
        "exported": (exported, "avx2/results.json"),
        "accuracy": (accuracy, "accuracy.json"),
        "subnets": (subnets, "accuracy.json"),
        "fall": (fall, "accuracy.json"),
        "paper": (paper, "paper/results.json"),
    }

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in makers:
            raise UserError(f"unknown table {name}; there are: {', '.join(makers)}")
        maker, file = makers[name]
        lines = maker(json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8")), language)
        return f"<!-- table: {name} -->\n" + "\n".join(lines) + "\n<!-- end of table -->"

    return BLOCK.sub(table, text)


def overview(results: dict[str, Any], language: str) -> list[str]:
    """A few medians of `speed` and `exported`, without anomalib's narrower model.

    Args:
        results: the content of a results.json.
    """
    return _medians(results, OVERVIEW[language], language, leave_out=ANOMALIB_NARROW)


def speed(results: dict[str, Any], language: str) -> list[str]:
    """Medians, a row a figure, a column a contender; then what was measured where, and two single figures.

    Args:
        results: the content of a results.json.
    """
    figures = results["figures"]
    memory = number(figures["memory/train.py"]["results"]["ours"]["median"], "bytes")
    infer, plain = (figures[key]["results"]["ours"]["median"] for key in ("start/infer", "start/paddle"))
    note = (
        f"Training bottle takes {memory} of memory at its peak; `deploy/infer.py` on one picture takes "
        f"{infer / plain:.2f} times as long as `import paddle`."
    )
    return [*_medians(results, SPEED, language), note]


def exported(results: dict[str, Any], language: str) -> list[str]:
    """Seconds that a run of an exported model takes, a row a runtime and batch size, a column a contender.

    Args:
        results: the content of a results.json.
    """
    return _medians(results, EXPORTED, language)


def paper(results: dict[str, Any], language: str) -> list[str]:
    """A row a configuration of the paper: a training step, its memory, and a picture in each runtime.

    Args:
        results: the content of a results.json.
    """
    titles = {
        "en": ("config", "training step, batch 8, features cached", "its peak memory", "one picture: "),
        "zh": ("配置", "训练一步，批大小 8，已有特征", "其内存峰值", "一张图片："),
    }[language]
    runtimes = {
        "own framework fp32": "Paddle Inference",
        "ONNX Runtime fp32": "ONNX Runtime",
        "OpenVINO fp32": "OpenVINO",
        "OpenVINO bf16": "OpenVINO, bfloat16",
    }
    heads = [*titles[:3], *(titles[3] + name for name in runtimes.values())]
    lines = [f"| {' | '.join(heads)} |", "| :-- |" + " --: |" * (len(heads) - 1)]
    for name in PAPER:
        figures = [results["figures"].get(f"paper/{name}/{what}") for what in ("step", "memory", *runtimes)]
        cells = [number(f["results"][OURS]["median"], f["unit"]) if f else "–" for f in figures]
        lines.append(f"| `paper/{name}.yaml` | {' | '.join(cells)} |")
    return [*lines, "", _where(results, language)]


def _medians(
    results: dict[str, Any], rows: Sequence[tuple[str, str]], language: str, leave_out: str | None = None
) -> list[str]:
    """The rows that were measured, with the contenders that were; then what was measured where."""
    figures = results["figures"]
    rows = [row for row in rows if row[0] in figures]
    columns = [
        (name, title)
        for name, title in zip(CONTENDERS, COLUMNS[language], strict=True)
        if name != leave_out and any(name in figures[key]["results"] for key, _ in rows)
    ]
    lines = [f"|  | {' | '.join(title for _, title in columns)} |", "| :-- |" + " --: |" * len(columns)]
    for key, text in rows:
        figure = figures[key]
        cells = [
            number(figure["results"][name]["median"], figure["unit"]) if name in figure["results"] else "–"
            for name, _ in columns
        ]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return [*lines, "", _where(results, language)]


def _where(results: dict[str, Any], language: str) -> str:
    """When, where and with what the figures of a results.json were measured."""
    machine, paddle, threads = results["machine"]["cpu"], results["versions"]["paddlepaddle"], results["threads"]
    return {
        "en": f"Medians of {results['date']}, {machine}, {threads} threads, PaddlePaddle {paddle}; "
        "float32 unless it says otherwise.",
        "zh": f"中位数，{results['date']}，{machine}，{threads} 个线程，PaddlePaddle {paddle}，未注明的都是 float32。",
    }[language]


def accuracy(results: dict[str, Any], language: str) -> list[str]:
    """The runs of configurations as they are, or with options other than those of `subnets`; see `_by_config`.

    Args:
        results: the content of accuracy.json.
    """
    return _by_config([run for run in results["runs"] if not _of_subnets(run)], language)


def subnets(results: dict[str, Any], language: str) -> list[str]:
    """The runs that ask for one subnet a step or for two.

    Args:
        results: the content of accuracy.json.
    """
    return _by_config([run for run in results["runs"] if _of_subnets(run)], language)


def _of_subnets(run: dict[str, Any]) -> bool:
    return any(option.startswith("share_subnet=") for option in run["options"])


def _by_config(measured: Sequence[dict[str, Any]], language: str) -> list[str]:
    """A row a category and configuration: means over the seeds, and the lowest and highest of the last epochs."""
    heads = {
        "en": (
            "category (pictures to learn from)",
            "config",
            "budget",
            "seeds",
            "last epoch: image AUROC",
            "last epoch: pixel AUROC",
            "at 50% of the budget: image / pixel",
            "at 75%",
            "minutes",
        ),
        "zh": (
            "类别（用来学习的图片数）",
            "配置",
            "预算",
            "种子数",
            "最后一轮：图像 AUROC",
            "最后一轮：像素 AUROC",
            "预算的 50%：图像 / 像素",
            "75%",
            "分钟",
        ),
    }[language]
    lines = [f"| {' | '.join(heads)} |", "| :-- | :-- | :-- |" + " :-: |" * (len(heads) - 3)]
    rows = {}
    for run in measured:
        rows.setdefault(
            (run["category"], run["config"], tuple(run["options"]), run["epochs"], run["steps"]), []
        ).append(run)
    words = {"en": ("{} epochs", "{} steps"), "zh": ("{} 轮", "{} 步")}[language]
    for (category, config, options, epochs, steps), runs in rows.items():
        half, later, last = ([at(run["history"], share) for run in runs] for share in (0.5, 0.75, 1))
        seconds = [sum(row["seconds"] for row in run["history"]) for run in runs]
        cells = [
            f"{category} ({runs[0]['pictures']})" + "".join(f", `{option}`" for option in options),
            f"`{config}.yaml`",
            words[0].format(epochs) if steps is None else words[1].format(steps),
            str(len(runs)),
            _spread([row["image_auroc"] for row in last], 3),
            _spread([row["pixel_auroc"] for row in last], 3),
            *(
                " / ".join(_mean([row[f"{kind}_auroc"] for row in part]) for kind in ("image", "pixel"))
                for part in (half, later)
            ),
            f"{sum(seconds) / len(seconds) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _origin(measured, language)]


def fall(results: dict[str, Any], language: str) -> list[str]:
    """How the published configuration goes on with the crops: a row every 20 epochs, as means over the seeds.

    Args:
        results: the content of accuracy.json.
    """
    runs = [run for run in results["runs"] if (run["category"], run["config"]) == ("crops", "resnet18")]
    heads = {
        "en": ("epoch", "training loss", "loss of the held-out pictures", "image AUROC", "pixel AUROC"),
        "zh": ("轮次", "训练损失", "留出图片的损失", "图像 AUROC", "像素 AUROC"),
    }[language]
    lines = [f"| {' | '.join(heads)} |", "| --: |" + " :-: |" * (len(heads) - 1)]
    for rows in zip(*(run["history"][19::20] for run in runs), strict=True):
        cells = [f"{rows[0]['epoch']:.0f}"]
        for key, digits in (("loss", 2), ("val_loss", 2), ("image_auroc", 3), ("pixel_auroc", 3)):
            cells.append(_spread([row[key] for row in rows], digits))
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    note = {
        "en": "`resnet18.yaml`, seeds {}: mean (lowest – highest). ",
        "zh": "`resnet18.yaml`，种子 {}：平均（最低 – 最高）。",
    }[language].format(seeds)
    return [*lines, "", note + _origin(runs, language)]


def at(history: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """The evaluated epoch that ends nearest to this share of the training."""
    ends = [row.get("steps") or row["epoch"] for row in history]
    measured = [(end, row) for end, row in zip(ends, history, strict=True) if row["image_auroc"] is not None]
    return min(measured, key=lambda pair: abs(pair[0] - share * ends[-1]))[1]


def _origin(runs: list[dict[str, Any]], language: str) -> str:
    """What these runs of accuracy.json were made with, when and where."""
    weights = ", ".join(sorted({run["last"]["backbone"]["file"] or "offline start" for run in runs}))
    dates = ", ".join(sorted({run["date"] for run in runs}))
    machines = ", ".join(sorted({run["machine"]["cpu"] for run in runs}))
    return {
        "en": f"{dates}, {machines}, backbone weights {weights}.",
        "zh": f"{dates}，{machines}，骨干权重 {weights}。",
    }[language]


def _spread(values: Sequence[float | None], digits: int) -> str:
    """The mean, and the lowest and the highest if there are several; a dash where nothing was measured."""
    if None in values:
        return "–"
    mean, low, high = (f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} – {high})" if len(values) > 1 else mean


def _mean(values: Sequence[float | None]) -> str:
    return _spread(values, 3).partition(" ")[0]


if __name__ == "__main__":
    run_main(main)
