"""report.html: one file, with all of it, that runs nothing and asks for nothing, whatever files are called."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from datasets.mvtec import load_category, load_ground_truth
from deploy.common.decisions import PUBLISHED_THRESHOLDS, Thresholds
from deploy.common.imaging import read_rgb
from utils.evaluation import Scores, measure_all, measure_defects
from utils.html_report import write_report
from utils.report import draw_evaluation
from utils.results import OFFLINE, UNSTATED
from utils.thresholds import outcome

HOSTILE = "<img src=x onerror=alert(1)>\"&'\u202e"
QUANTILE = Thresholds(0.5, 0.5, "quantile", "quantile")


class Page(HTMLParser):
    """The tags, attributes and texts of a page; tags must be closed in order."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def reported(config, tmp_path):
    """Writes the report of a category of noise, 15 good and 15 defect pictures; returns its path, text and page."""
    random, config = np.random.default_rng(0), replace(config, input_size=64)
    folder = tmp_path / "data/part"

    def noise(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(path)

    def report(tests=15, thresholds=QUANTILE, rate=0.05, backbone=UNSTATED, sensitivity=None, size=40, **of_checkpoint):
        for i in range(6):
            noise(folder / f"train/good/{i}.png", 32 + 8 * (i > 3))
        for i in range(tests):
            noise(folder / f"test/good/{i}.png", size)
            noise(folder / f"test/{HOSTILE.replace('/', '')}/{i} {HOSTILE}.png", size)
        category = load_category(tmp_path / "data", "part")
        truth = load_ground_truth(category.test, config.size, "published")
        maps = random.random((2 * tests, *config.size), np.float32)
        scores = Scores(np.linspace(0.2, 0.9, 2 * tests, dtype=np.float32), maps)
        if not tests:
            scores = Scores(np.zeros(0, np.float32), np.zeros((0, 0, 0), np.float32))
        checkpoint = tmp_path / "results/exp/part/best.pdparams"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"weights")
        figures = measure_all(scores, truth)
        row = {
            **figures,
            "selection": "last",
            "checkpoint": str(checkpoint),
            "epoch": 3,
            "epoch_in_file": 3,
            "backbone": backbone,
            "images": 2 * tests,
            "anomalous_images": tests,
            "images_with_mask": 0,
            "decisions": {"image": thresholds.image, "rule": thresholds.rule},
            "defects": measure_defects(scores, truth, category.test, config, thresholds.image),
        }
        paths = [image.path for image in category.test]
        draw_evaluation(checkpoint.parent / "evaluation", paths, scores, truth, figures, thresholds, read_rgb)
        decisions = {"false_alarm_rate": rate, **outcome(thresholds, scores, truth)}
        of_checkpoint.setdefault("learnt_from", category.digest_of(category.train[1:]))
        write_report(
            checkpoint.parent,
            row,
            category,
            {"held_out": ["0.png"], **of_checkpoint},
            config.as_dict(),
            scores,
            truth,
            thresholds,
            decisions,
            sensitivity,
            read_rgb,
        )
        path = checkpoint.parent / "report.html"
        text = path.read_text(encoding="utf-8")
        return path, text, Page(text)

    return report


def test_it_runs_nothing_asks_for_nothing_and_stays_small(reported):
    path, text, page = reported(size=300)
    assert path.stat().st_size < 3e6
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 24 + 2  # histogram and ROC curves; no training has drawn its curves here
    assert all(value.startswith("data:image/") for value in sources)
    assert not re.search(r"https?:|url\(|@import", text)


def test_names_are_text(reported):
    _, text, page = reported()
    assert text.count("onerror=alert(1)") == text.count("&lt;img src=x onerror=alert(1)&gt;&quot;&amp;&#x27;\\u202e")
    assert "\u202e" not in text
    assert f"test/{HOSTILE[:-1]}" in page.text


def test_figures_decisions_and_what_was_learnt_from(reported):
    _, text, page = reported()
    assert re.search(r"image auroc \d\.\d{3} \d\.\d{3} – \d\.\d{3}", page.text)
    assert "pixel auroc n/a -" in page.text
    alarms, missed = re.search(
        r"false alarms (\d+) of 15 good \(promised 0.05\), missed (\d+) of 15", page.text
    ).groups()
    assert f"good pictures {15 - int(alarms)} {alarms} " in page.text
    assert f"defects {missed} {15 - int(missed)} " in page.text
    assert "5 good pictures (3 of 32x32, 2 of 40x40); 1 held out; sha256" in page.text
    assert "(12 of 15)" in page.text
    assert text.count("<b class=wrong>") > 0
    assert "numpy " in page.text and "Python 3" in page.text
    assert "eval.py --sensitivity" in page.text


def test_the_worst_come_first(reported):
    _, _, page = reported()
    shown = [re.match(r"test/(good)?.*score: +(\d\.\d{3})", text) for text in page.texts if text.startswith("test/")]
    good = [float(caption[2]) for caption in shown if caption[1]]
    defects = [float(caption[2]) for caption in shown if not caption[1]]
    assert len(good) == len(defects) == 12
    assert good == sorted(good, reverse=True)
    assert defects == sorted(defects)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": {"source": OFFLINE, "file": None, "sha256": None}}, "accuracy figures mean nothing"),
        ({"thresholds": PUBLISHED_THRESHOLDS, "rate": None}, "threshold is the published one"),
        ({"thresholds": Thresholds(0.5, 0.5, "f1", "f1"), "rate": None}, "threshold was chosen on these test pictures"),
        ({"learnt_from": "00ff"}, "pictures came or went"),
        ({"learnt_from": None}, "the checkpoint does not say; the folder has 5 good pictures"),
        ({"learnt_from": [HOSTILE]}, "the checkpoint does not say"),
        ({"thresholds": Thresholds(0.25, 0.5, "quantile", "quantile")}, "not like those of train"),
    ],
)
def test_what_to_know_before_the_figures_are_trusted(reported, changes, words):
    assert words in reported(**changes)[2].text


def test_without_test_pictures_it_still_says_what_is_known(reported):
    line = "spots of 14 px (of 1600 px) and more are found in 9 of 10 cases"
    rows = [{"picture_px": 14.0, "input_px": 2, "drawn": 4, "found": 4}]
    rows[0] |= {"by_contrast": {"0.1": {"drawn": 4, "found": 4}}, "by_kind": {"blob": {"drawn": 0, "found": 0}}}
    _, _, page = reported(tests=0, sensitivity={"line": line, "by_size": rows})
    assert "There are no test pictures" in page.text
    assert "has no test pictures, so there is no AUROC" in page.text
    assert page.text.count(line) == 2
    assert "14 2 4 of 4 - 4 of 4" in page.text
    assert "5 good pictures" in page.text
