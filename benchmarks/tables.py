"""The measured tables of both READMEs, made of results.json and accuracy.json: python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; the command writes it anew.
"""

import json
import re
from typing import Any

from benchmarks.inputs import ROOT
from benchmarks.report import CONTENDERS, number
from deploy.cli import UserError, run_main
from deploy.files import write_text

READMES = {"README.md": "zh", "README_en.md": "en"}
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
# Rows of the table of speed: key in results.json, in English, in Chinese.
SPEED = (
    ("step/cached/8", "training step, batch 8, features cached", "训练一步，批 8，特征已缓存"),
    ("step/backbone/8", "training step, batch 8, with the backbone", "训练一步，批 8，含骨干网络"),
    ("step/cached/32", "training step, batch 32, features cached", "训练一步，批 32，特征已缓存"),
    ("step/backbone/32", "training step, batch 32, with the backbone", "训练一步，批 32，含骨干网络"),
    ("epoch", "first epoch with evaluation, 209 + 83 pictures", "第一轮训练和评估，209+83 张图片"),
    ("later epoch", "each later epoch", "之后的每一轮"),
    ("evaluation/83", "evaluation of 83 maps of 256x256, model excluded", "评估 83 张 256×256 的图，不含模型"),
    ("latency", "latency of one picture", "单张图片的延迟"),
    ("throughput/8", "throughput, batch 8", "吞吐量，批 8"),
)
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
        "发布版的图，默认环境",
        "发布版的图，最佳环境",
        "anomalib 2.7，宽度 1.06",
        "anomalib 2.7，宽度 1.0",
    ),
}


def main() -> None:
    for name in READMES:
        path = ROOT / name
        write_text(path, with_tables(path.read_text(encoding="utf-8"), READMES[name]))


def with_tables(text: str, language: str) -> str:
    """The README's text with every table made anew.

    Args:
        text: of the README.
        language: `en` or `zh`.

    Raises:
        UserError: the text names a table that is not known.
    """
    folder = ROOT / "benchmarks"
    makers = {
        "speed": lambda: speed(json.loads((folder / "results.json").read_text()), language),
        "accuracy": lambda: accuracy(json.loads((folder / "accuracy.json").read_text()), language),
    }

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in makers:
            raise UserError(f"README: unknown table {name}; there are: {', '.join(makers)}")
        return f"<!-- table: {name} -->\n" + "\n".join(makers[name]()) + "\n<!-- end of table -->"

    return BLOCK.sub(table, text)


def speed(results: dict[str, Any], language: str) -> list[str]:
    """Medians, a row a figure, a column a contender; then what was measured where, and two single figures.

    Args:
        results: the content of results.json.
    """
    figures = results["figures"]
    lines = [f"|  | {' | '.join(COLUMNS[language])} |", "| :-- |" + " --: |" * len(COLUMNS[language])]
    for key, *texts in SPEED:
        cells = [
            number(figures[key]["results"][name]["median"], figures[key]["unit"])
            if name in figures[key]["results"]
            else "–"
            for name in CONTENDERS
        ]
        lines.append(f"| {texts[language == 'zh']} | {' | '.join(cells)} |")
    machine = results["machine"]["cpu"]
    paddle = results["versions"]["paddlepaddle"]
    memory = number(figures["memory/train.py"]["results"]["ours"]["median"], "bytes")
    infer, plain = (figures[key]["results"]["ours"]["median"] for key in ("start/infer", "start/paddle"))
    note = {
        "en": f"Medians of {results['date']}, {machine}, {results['threads']} threads, PaddlePaddle {paddle}, float32. "
        f"Training bottle takes {memory} of memory at its peak; `deploy/infer.py` on one picture takes "
        f"{infer / plain:.2f} times as long as `import paddle`.",
        "zh": f"中位数，{results['date']}，{machine}，{results['threads']} 个线程，PaddlePaddle {paddle}，float32。"
        f"训练 bottle 的内存峰值为 {memory}；`deploy/infer.py` 处理一张图片的总时间是 `import paddle` 的 "
        f"{infer / plain:.2f} 倍。",
    }
    return [*lines, "", note[language]]


def accuracy(results: dict[str, Any], language: str) -> list[str]:
    """A row a run: the last epoch, the highest value of the run, and the lowest of its second half.

    Args:
        results: the content of accuracy.json.
    """
    heads = {
        "en": (
            "config",
            "seed",
            "last epoch: image / pixel AUROC",
            "highest of all epochs",
            "lowest of the second half",
            "checkpoint chosen by the config",
        ),
        "zh": ("配置", "种子", "最后一轮：图像 / 像素 AUROC", "各轮最高", "后一半轮次的最低", "配置选出的检查点"),
    }[language]
    lines = [f"| {' | '.join(heads)} |", "| :-- |" + " :-: |" * (len(heads) - 1)]
    epoch_word = {"en": "epoch {}", "zh": "第 {} 轮"}[language]
    for run in results["runs"]:
        pairs = [(r["image_auroc"], r["pixel_auroc"]) for r in run["history"] if r["image_auroc"] is not None]
        columns = list(zip(*pairs, strict=True))
        late = list(zip(*pairs[len(pairs) // 2 :], strict=True))
        chosen = run["chosen"]
        cells = [
            f"`{run['config']}.yaml`",
            str(run["seed"]),
            _pair(pairs[-1]),
            _pair([max(column) for column in columns]),
            _pair([min(column) for column in late]),
            f"{epoch_word.format(chosen['epoch'])}: {_pair((chosen['image_auroc'], chosen['pixel_auroc']))}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    files = {run["last"]["backbone"]["file"] for run in results["runs"]}
    weights = ", ".join(sorted(file or "offline start" for file in files))
    dates = ", ".join(sorted({run["date"] for run in results["runs"]}))
    machines = ", ".join(sorted({run["machine"]["cpu"] for run in results["runs"]}))
    selections = ", ".join(sorted({run["chosen"]["selection"] for run in results["runs"]}))
    note = {
        "en": "{} of MVTec AD, {} epochs, {}, {}, backbone weights {}; selection of the checkpoint: {}.",
        "zh": "MVTec AD 的 {}，{} 轮，{}，{}，骨干权重 {}；检查点的选择：{}。",
    }[language].format(results["category"], results["epochs"], dates, machines, weights, selections)
    return [*lines, "", note]


def _pair(values: tuple[float, float] | list[float]) -> str:
    return " / ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    run_main(main)
