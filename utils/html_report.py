"""`report.html`: all there is to say of one category's model in a file that can be sent on.

It holds no script and asks nothing of other addresses: pictures are part of it. Headings are in both languages.
"""

import base64
import html
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import yaml
from PIL import Image

from datasets.mvtec import Category, GroundTruth
from deploy.common.cli import escaped, printable
from deploy.common.decisions import Thresholds
from deploy.common.files import sha256, write_text
from deploy.common.imaging import FORMATS, decision_line, draw_panels
from utils.intervals import BINS, DRAWS, intervals, rate_interval
from utils.report import TITLES, Row, defect_notes, defect_table, describe_epoch
from utils.results import OFFLINE, describe_backbone, describe_lack, describe_selection, figure
from utils.sensitivity import sensitivity_table
from utils.thresholds import alarm_line, broken_promise

if TYPE_CHECKING:
    from utils.evaluation import Scores  # imports paddle, which scripts must set up before

WORST = {
    False: ("Good pictures with the highest scores", "得分最高的良品"),
    True: ("Defects with the lowest scores", "得分最低的缺陷品"),
}
PANELS = (
    "The picture; its anomaly scores; the area above the pixel threshold (red) and, where it is known, the true defect "
    "(cyan)."
)
SHOWN = 12  # pictures of each kind
PANEL = 220  # pixels, at most, of a side of a picture's panels
PANEL_BYTES = 45_000  # of a picture with its maps
PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "opencv-python-headless", "opencv-python", "pillow")
PAGE = Path(__file__).with_suffix(".html")  # with places for a title and for what is in it
NO_SENSITIVITY = (
    "What can be found was not measured with this threshold: eval.py --sensitivity does, where the training has held "
    "good pictures out."
)
DRAWN = (
    "These defects are drawn, not real: on good pictures that training did not use, at their full size, before they "
    "are resized for the model. Size: longest extent. Contrast: mean change, in the channel that changes most, as a "
    "share of the way from black to white. Real defects may be harder or easier to find."
)
INTERVALS = (
    f"Intervals: of {DRAWS} test sets drawn from this one with replacement, good and defect pictures apart, each as "
    f"large as it; figures of pixels from {BINS} bins of the score. Where no picture is on the wrong side they show "
    "no spread. An interval tells what chance does, not what other parts, light or cameras do."
)


def write_report(
    folder: Path,
    row: Row,
    category: Category,
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    scores: "Scores",
    truth: GroundTruth,
    thresholds: Thresholds,
    decisions: Mapping[str, Any],
    sensitivity: Mapping[str, Any] | None,
    read: Callable[[Path], np.ndarray],
) -> None:
    """Write report.html, of what `utils.report.draw_evaluation` and train.py have left in the folder too.

    Args:
        folder: of the category's results.
        row: its entry in eval.json.
        category: the pictures.
        checkpoint: what the model was filled from.
        config: of the model.
        scores, truth: of the test pictures, none perhaps.
        thresholds: that predict.py goes on with.
        decisions: their `utils.thresholds.outcome`, with the promised `false_alarm_rate`, None if there is none.
        sensitivity: what sensitivity.json holds, None if nothing was measured with these thresholds.
        read: gives a picture, (h, w, 3) uint8 RGB.

    Raises:
        UserError: it cannot be written.
    """
    wrong = (scores.image > thresholds.image) != truth.labels
    worst = [_cards(category, scores, truth, thresholds, read, of, wrong) for of in (~truth.labels, truth.labels)]
    learnt, changed = _learnt_from(category, checkpoint)
    parts = [
        _summary(folder, row, truth, thresholds, decisions, sensitivity, changed),
        _figures(row, scores, truth, config["seed"]),
        _heading("Decisions at the threshold", "按阈值的判定"),
        _confusion(decisions),
        f"<p class=soft>{_safe(thresholds.describe())}</p>",
        "<div class=cards>",
        _image(folder / "evaluation/scores.png", "Histogram of the image scores of good and defect pictures"),
        _image(folder / "evaluation/roc.png", "ROC curves"),
        "</div>",
        _findings(folder, sensitivity),
        _defects(category.name, row),
        *worst,
        _training(folder, row, checkpoint, config, learnt),
        _repeat(folder, category, config),
    ]
    page = Template(PAGE.read_text(encoding="utf-8"))
    title = _safe(f"{category.name}: report")
    write_text(folder / "report.html", page.substitute(title=title, body="\n".join(parts)))


def _summary(
    folder: Path,
    row: Row,
    truth: GroundTruth,
    thresholds: Thresholds,
    decisions: Mapping[str, Any],
    sensitivity: Mapping[str, Any] | None,
    changed: Sequence[str],
) -> str:
    """The title, what matters most, and what a reader must know before the figures are trusted."""
    short = [f"A picture is called an anomaly above a score of {thresholds.image:.3f} (rule: {thresholds.rule})."]
    if truth.labels.size:
        short.append(f"On the test pictures: {alarm_line(decisions, decisions['false_alarm_rate'])}.")
    short.append(f"Drawn defects: {sensitivity['line']}." if sensitivity else NO_SENSITIVITY)
    lack = describe_lack(truth.labels)
    broken = decisions["false_alarm_rate"] and broken_promise(decisions, decisions["false_alarm_rate"])
    optimistic = "was chosen on these test pictures: on new ones it will be worse."
    cautions = [
        (row["backbone"]["source"] == OFFLINE, "The backbone has no ImageNet weights: accuracy figures mean nothing."),
        (lack, f"The category {lack}, so there is no AUROC."),
        (row["selection"] == "test_auroc" and truth.labels.size, f"The checkpoint {optimistic}"),
        (thresholds.rule == "f1", f"The threshold {optimistic}"),
        (thresholds.rule == "published", "The threshold is the published one; it was not made for these pictures."),
        (broken, f"{broken}."),
    ]
    notes = [*(text for holds, text in cautions if holds), *changed]
    about = f"Anomaly detection with FastFlow; {folder.parent.name}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"<h1>{_safe(folder.name)}</h1><p class=soft>{_safe(about)}</p>"
        f"<div class=first>{_list(short)}{_list(notes, 'wrong')}</div>"
    )


def _figures(row: Row, scores: "Scores", truth: GroundTruth, seed: int) -> str:
    if not truth.labels.size:
        return f"{_heading('Figures', '指标')}<p>There are no test pictures, so nothing could be measured.</p>"
    spans = intervals(scores, truth, seed)
    lines = [[title, figure(row[key]), _span(spans.get(key))] for key, title in TITLES.items()]
    table = _table([["figure", "value", "95% interval"], *lines])
    return f"{_heading('Figures', '指标')}{table}<p class=soft>{_safe(INTERVALS)}</p>"


def _findings(folder: Path, sensitivity: Mapping[str, Any] | None) -> str:
    heading = _heading("What can be found", "能发现什么（人工绘制的缺陷）")
    if not sensitivity:
        return f"{heading}<p>{_safe(NO_SENSITIVITY)}</p>"
    picture = _image(folder / "sensitivity.png", "Share of the drawn defects that is found, by size")
    line = f"<p>{_safe(sensitivity['line'])}.</p><p class=soft>{_safe(DRAWN)}</p>"
    return f"{heading}{line}{_table(sensitivity_table(sensitivity))}{picture}"


def _defects(name: str, row: Row) -> str:
    table = [cells[1:] for cells in defect_table({name: row}, figure)]
    return f"{_heading('By defect', '按缺陷')}{_table(table)}{_list(defect_notes({name: row}))}" if table else ""


def _training(folder: Path, row: Row, checkpoint: Mapping[str, Any], config: Mapping[str, Any], learnt: str) -> str:
    path, history = Path(row["checkpoint"]), checkpoint.get("history", [])
    tested = f"{row['images']}, {row['anomalous_images']} with a defect, {row['images_with_mask']} with a mask"
    seconds = sum(epoch["seconds"] for epoch in history)
    facts = [
        ["learnt from", learnt],
        ["test pictures", tested],
        ["backbone", f"{config['backbone_name']}; weights: {describe_backbone(row['backbone'])}"],
        ["checkpoint", f"{path}, sha256 {sha256(path)[:12]}, epoch {describe_epoch(row)}"],
        ["chosen by", describe_selection(row["selection"])],
        ["time", f"{len(history)} epochs, {seconds:.0f} s" if history else "the checkpoint does not say"],
        ["versions", _versions()],
    ]
    curves = _image(folder / "curves.png", "Losses, and AUROCs where they were measured, by epoch")
    return f"{_heading('Training', '训练')}<div class=facts>{_table([['', ''], *facts])}</div>{curves}"


def _repeat(folder: Path, category: Category, config: Mapping[str, Any]) -> str:
    """The commands, and the settings that they use."""
    train = ["python", "train.py", "-cfg", folder / "config.yaml", "--data", category.folder.parent]
    train += ["--exp_dir", folder.parent.name, "-cat", category.name]
    commands = [train] if (folder / "config.yaml").exists() else []
    commands.append(["python", *sys.orig_argv[1:]])
    settings = yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None).splitlines()
    blocks = [_heading("To repeat it", "重现")]
    for lines in ([shlex.join(map(str, command)) for command in commands], settings):
        blocks.append("<pre>" + "\n".join(html.escape(escaped(line)) for line in lines) + "</pre>")
    return "".join(blocks)


def _learnt_from(category: Category, checkpoint: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The pictures of the training in words, and what is to be said where they are not those of the folder now."""
    held_out = set(checkpoint.get("held_out", []))
    pictures = [path for path in category.train if category.name_of(path) not in held_out]
    stated = checkpoint.get("learnt_from")
    sizes: dict[str, int] = {}
    for path in pictures:
        try:
            with Image.open(path, formats=FORMATS) as image:
                size = f"{image.width}x{image.height}"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            size = "unreadable"
        sizes[size] = sizes.get(size, 0) + 1
    some = sorted(sizes.items(), key=lambda item: -item[1])
    now = f"{len(pictures)} good pictures ({', '.join(f'{count} of {size}' for size, count in some[:4])}"
    now += f" and {len(some) - 4} more sizes" * (len(some) > 4) + f"); {len(held_out)} held out"
    digest = category.digest_of(pictures)
    if not isinstance(stated, str):
        return f"the checkpoint does not say; the folder has {now}; sha256 of the list of names {digest[:12]}", []
    if stated == digest:
        return f"{now}; sha256 of the list of names {digest[:12]}", []
    words = f"a list of names with sha256 {printable(stated)[:12]}; the folder has another one now: {now}"
    return words, ["The folder of good pictures is not what it was in the training: pictures came or went."]


def _confusion(decisions: Mapping[str, Any]) -> str:
    """The table of what was decided of good and of defect pictures."""
    lines = [["", "called normal", "called an anomaly", "wrong", "95% interval"]]
    for title, of, wrong, is_left in (
        ("good pictures", "good_test_pictures", "false_alarms", False),
        ("defects", "defect_test_pictures", "missed_defects", True),
    ):
        count, all_of = decisions[wrong], decisions[of]
        right = all_of - count
        share = f"{count / all_of:.1%}" if all_of else "-"
        interval = rate_interval(count, all_of) if all_of else None
        lines.append([title, *map(str, (count, right) if is_left else (right, count)), share, _span(interval)])
    return _table(lines)


def _cards(
    category: Category,
    scores: "Scores",
    truth: GroundTruth,
    thresholds: Thresholds,
    read: Callable[[Path], np.ndarray],
    of: np.ndarray,
    wrong: np.ndarray,
) -> str:
    """The worst of the good or of the defect pictures, with their maps, names, scores and what was decided.

    `of` and `wrong` are (N,) bool: the pictures of this kind, and those that were decided wrongly.
    """
    indices = np.flatnonzero(of)
    if not len(indices):
        return ""
    are_defects = truth.labels[indices[0]]
    indices = indices[np.argsort(scores.image[indices] * (1 if are_defects else -1), kind="stable")][:SHOWN]
    title, chinese = WORST[bool(are_defects)]
    cards = []
    for i in indices:
        path, score = category.test[i].path, float(scores.image[i])
        mask = None if truth.masks is None else truth.masks[i]
        panels = draw_panels(read(path), scores.pixel[i], thresholds.pixel, mask)
        height, width = panels[0].shape[:2]
        factor = PANEL / max(height, width)
        size = max(round(width * factor), 1), max(round(height * factor), 1)
        joined = np.concatenate([cv2.resize(panel, size, interpolation=cv2.INTER_AREA) for panel in panels], axis=1)
        text = f"{path.relative_to(category.folder)}: {decision_line(score, thresholds.image)}"
        mark = " <b class=wrong>(wrong)</b>" * int(wrong[i])
        cards.append(
            f"<figure>{_inline(_jpeg(joined), 'jpeg', text)}<figcaption>{_safe(text)}{mark}</figcaption></figure>"
        )
    heading = _heading(f"{title} ({len(indices)} of {int(of.sum())})", chinese)
    return f"{heading}<p class=soft>{PANELS}</p><div class=cards>{''.join(cards)}</div>"


def _jpeg(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as JPEG of `PANEL_BYTES` or little more."""
    for quality in (88, 75, 55, 30):
        _, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(content) <= PANEL_BYTES:
            break
    return content.tobytes()


def _image(path: Path, text: str) -> str:
    """A PNG of the folder; nothing where there is none."""
    return f"<p>{_inline(path.read_bytes(), 'png', text)}</p>" if path.exists() else ""


def _inline(content: bytes, kind: str, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{_safe(text)}" src="data:image/{kind};base64,{data}">'


def _heading(english: str, chinese: str) -> str:
    return f"<h2>{_safe(english)} <span lang=zh>{chinese}</span></h2>"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """The first line holds the titles; none are shown where all are empty."""
    rows = []
    for cells, tag in zip(lines, ["th", *["td"] * len(lines)], strict=False):
        if any(cells):
            rows.append(f"<tr>{''.join(f'<{tag}>{_safe(cell)}</{tag}>' for cell in cells)}</tr>")
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _list(texts: Sequence[str], kind: str = "") -> str:
    return f"<ul class='{kind}'>{''.join(f'<li>{_safe(text)}</li>' for text in texts)}</ul>" if texts else ""


def _span(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}"


def _versions() -> str:
    """Of what the figures were computed with."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return f"{', '.join(found)}; {platform.platform()}"


def _safe(text: str) -> str:
    """Text of anyone as HTML, in one line."""
    return html.escape(printable(str(text)))
