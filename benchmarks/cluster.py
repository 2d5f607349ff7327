"""Scoring many pictures with deploy/score.py on a Ray cluster of this machine, against deploy/infer.py."""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.inputs import ROOT
from benchmarks.processes import run_command
from benchmarks.report import OURS, Figure
from deploy.common.files import make_folder

FEW = 16  # pictures of the runs that tell what starting takes
# deploy/score.py, which leaves its own peak memory in a file: that of Ray's processes is another matter.
DRIVER = """
import sys
from pathlib import Path
from deploy import score
from deploy.common import runtime
peak = Path(sys.argv.pop(1))
try:
    score.main()
finally:
    peak.write_text(str(runtime.peak_memory()))
"""


def scoring(exported: Path, source: Path, pictures: int, paths: Sequence[int], folder: Path) -> Iterator[Figure]:
    """Pictures a second of `infer.py`, and of one and two actors, a core each; peak memory of what drives them.

    What starting takes is left out of the pictures a second: it is the time of `FEW` pictures.

    Args:
        exported: a model with its ONNX form.
        source: a folder of pictures, each of which stands for many.
        pictures: how many to score.
        paths: lengths of lists, whose driver's memory is measured. The pictures in them, but for the first, are not
            there, so that a million are a matter of minutes.
        folder: where all is written.
    """
    own = make_folder(folder / "pictures"), make_folder(folder / "few")
    originals = sorted(source.absolute().iterdir())
    for target, count in zip(own, (pictures, FEW), strict=True):
        for i in range(count):
            original = originals[i % len(originals)]
            (target / f"{i:07d}{original.suffix}").symlink_to(original)
    model = ["--save_inference_dir", str(exported), "--backend", "openvino", "--batch_size", "8"]
    infer = [str(ROOT / "deploy/infer.py"), *model, "--cpu_threads", "1", "--image_path"]
    score = [str(ROOT / "deploy/score.py"), *model, "--input"]
    group = f"Scoring {pictures} pictures, a core for each process"

    def seconds(words: list[str], name: str, target: Path) -> float:
        output = str(folder / f"{name}-{target.name}")  # both tell regions too
        told = ["--save_json", f"{output}.json"] if words is infer else ["--output", output, "--actors", name[-1]]
        return run_command([sys.executable, *words, str(target), *told], folder).seconds

    for name, title, words in (
        ("infer", "deploy/infer.py", infer),
        ("actors1", "deploy/score.py, one actor", score),
        ("actors2", "deploy/score.py, two actors", score),
    ):
        many, few = (seconds(words, name, target) for target in own)
        rate = (pictures - FEW) / (many - few)
        yield Figure(f"scoring/{name}", group, title, "images/s", {OURS: [rate]})
    for number, count in enumerate(paths):
        listed = folder / f"{count}.csv"
        with open(listed, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["path"], [originals[0]]])
            writer.writerows([f"/archive/camera-{i % 40:02d}/2026-11-28/picture-{i:09d}.png"] for i in range(1, count))
        peak = folder / f"{count}.txt"
        words = [*model, "--input", str(listed), "--output", str(folder / f"list-{count}"), "--actors", "1"]
        finished = run_command([sys.executable, "-c", DRIVER, str(peak), *words], folder, {"PYTHONPATH": str(ROOT)})
        title = f"driver of deploy/score.py, a list of {count} paths"
        yield Figure(f"memory/list{number}", "Peak memory", title, "bytes", {OURS: [float(peak.read_text())]})
        title = f"a list of {count} paths, all but the first missing, from the command to the rows"
        yield Figure(f"list{number}", group, title, "s", {OURS: [finished.seconds]})
