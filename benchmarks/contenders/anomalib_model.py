"""anomalib from picture files to an exported model, as its users make one: its Engine, its Folder, its Fastflow.

All settings are its defaults (ResNet18, `hidden_ratio=1.0`, 256x256), and the model is exported to ONNX. By its own
recipe it goes on for at most 500 epochs in batches of 32, until the pixel AUROC on its validation pictures, half of the
test pictures, has not risen for 3 epochs.
"""

import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Fastflow
from lightning.pytorch.callbacks import EarlyStopping


class AnomalibModel:
    """See benchmarks.contenders for the measurements."""

    def describe(self) -> dict[str, Any]:
        """Versions."""
        return {"torch": torch.__version__, "anomalib": version("anomalib")}

    def model(self, category: str, target: str, weights: str | None, steps: int | None, batch: int) -> dict[str, int]:
        torch.manual_seed(0)
        folder = Path(category)
        defects = sorted(entry.name for entry in (folder / "test").iterdir() if entry.name != "good")
        data = Folder(
            folder.name,
            "train/good",
            root=folder,
            abnormal_dir=[f"test/{name}" for name in defects],
            normal_test_dir="test/good",
            mask_dir=[f"ground_truth/{name}" for name in defects],
            train_batch_size=batch,
            num_workers=len(os.sched_getaffinity(0)),
            seed=0,
        )
        model = Fastflow(pre_trained=False, visualizer=False)
        if weights:
            _fill(model.model.feature_extractor, Path(weights))
        if steps:
            epochs = math.ceil(steps * batch / len(list((folder / "train/good").iterdir())))
            until = {"max_steps": steps, "max_epochs": epochs, "check_val_every_n_epoch": epochs}
        else:
            until = {"max_epochs": 500, "callbacks": [EarlyStopping("pixel_AUROC", mode="max", patience=3)]}
        engine = Engine(default_root_dir=target, accelerator="cpu", enable_progress_bar=False, **until)
        engine.fit(model, datamodule=data)
        engine.export(model, ExportType.ONNX, export_root=target)
        return {"epochs": engine.trainer.current_epoch, "steps": engine.trainer.global_step}


def _fill(backbone: torch.nn.Module, weights: Path) -> None:
    """Fill timm's ResNet18 from an .npz with Paddle's names."""
    arrays, state = np.load(weights), backbone.state_dict()
    for name in state:
        stored = name.replace("running_mean", "_mean").replace("running_var", "_variance")
        if stored in arrays:
            state[name] = torch.from_numpy(arrays[stored])
    backbone.load_state_dict(state)
