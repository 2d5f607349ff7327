"""Real bottles and real weights, when FASTFLOW_MVTEC_DIR and FASTFLOW_BACKBONE_WEIGHTS name them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def test_a_short_training_on_real_bottles(mvtec, imagenet_weights, tmp_path):
    """One epoch in batches of four, with the steps of seven published ones: not converged, but well on the way."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    options = ["-cfg", "configs/resnet18.yaml", "--data", mvtec, "-cat", "bottle", "--exp_dir", "exp"]
    environ = {**os.environ, "FASTFLOW_BACKBONE_WEIGHTS": imagenet_weights}
    for script, more in (("train.py", ["--epochs", "1", "--batch_size", "4"]), ("eval.py", [])):
        command = [sys.executable, ROOT / script, *options, *more]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    bottle = json.loads((tmp_path / "results/exp/eval.json").read_text())["categories"]["bottle"]
    assert (bottle["images"], bottle["anomalous_images"], bottle["images_with_mask"]) == (83, 63, 63)
    assert bottle["backbone"]["source"] == "FASTFLOW_BACKBONE_WEIGHTS"
    assert bottle["image_auroc"] > 0.9
    assert bottle["pixel_auroc"] > 0.85
