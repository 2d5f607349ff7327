"""Folders of results, names and figures as text. No paddle here: scripts need it before the runtime is set up."""

from pathlib import Path
from typing import Any

import numpy as np

from deploy.common.cli import UserError, printable

RESULTS = Path("results")
UNSTATED = {"source": "not stated in the checkpoint", "file": None, "sha256": None}  # of published files
OFFLINE = "offline start"  # source of a backbone without ImageNet weights
SELECTIONS = {  # how the checkpoint was chosen among the epochs; the first is the published rule
    "test_auroc": "best checkpoint chosen on the test set",
    "last": "last checkpoint, no choice",
    "last_by_patience": "last checkpoint; what chooses the best one ended the training by its patience",
    "val_likelihood": "best checkpoint chosen by the likelihood of held-out good pictures",
}


def experiment_folder(exp_dir: str) -> Path:
    """`results/{exp_dir}`, which holds a folder per category with its checkpoints.

    Raises:
        UserError: the name is empty, or leads out of results/.
    """
    if not exp_dir.strip("/.") or Path(exp_dir).is_absolute() or ".." in Path(exp_dir).parts:
        raise UserError(f"--exp_dir {exp_dir}: must name a folder under results/")
    return RESULTS / exp_dir


def category_folder(exp_dir: str, category: str) -> Path:
    """`results/{exp_dir}/{category}`, which holds the category's checkpoints.

    Raises:
        UserError: one of the names is empty or leads out of its folder.
    """
    if category in ("", "..") or Path(category).name != category:
        raise UserError(f"category {category}: must be the name of a folder, not a path")
    return experiment_folder(exp_dir) / category


def rounded(value: float | None) -> float | None:
    """An AUROC as the published scripts see it, to three decimals by numpy's rule; None where it was not measured."""
    return None if value is None else float(np.round(value, 3))


def figure(value: float | None, decimals: int = 3) -> str:
    """An AUROC as text, `n/a` where it was not measured; of the published three decimals, others are 0."""
    return "n/a" if value is None else f"{rounded(value):.{decimals}f}"


def published_line(name: str, pixel: float | None, image: float | None, gap: int = 3, decimals: int = 3) -> str:
    """A category's line as the published scripts print it: eval.py has 3 blanks between the AUROCs, train.py 4."""
    return f"{name:15}  pixel auroc:{figure(pixel, decimals)}{' ' * gap}image auroc:{figure(image, decimals)}"


def evaluation_line(image: float | None, pixel: float | None) -> str:
    """The AUROCs of one evaluation as the published scripts print them."""
    return f"EVAL:  image-auc : {figure(image, 6)} pixel-auc:{figure(pixel, 6)}"


def describe_lack(labels: np.ndarray) -> str | None:
    """What a test set lacks for an AUROC, in words; None if nothing.

    Args:
        labels: (N,) bool, which of its pictures have a defect.
    """
    if labels.any() and not labels.all():
        return None
    if not labels.size:
        return "has no test pictures"
    return "has no test picture " + ("that is good" if labels.all() else "with a defect")


def describe_backbone(provenance: dict[str, Any]) -> str:
    """Where the backbone's weights came from, in a line."""
    if provenance == UNSTATED:
        return provenance["source"]
    if provenance["source"] == OFFLINE:
        return f"{OFFLINE}, no ImageNet weights: accuracy figures mean nothing"
    return printable(f"{provenance['file']} ({provenance['source']}, sha256 {provenance['sha256'][:12]})")


def describe_selection(selection: str | None) -> str:
    """How the checkpoint was chosen, in a line; None stands for a result that does not say."""
    return f"{selection} ({SELECTIONS[selection]})" if selection in SELECTIONS else selection or "not stated"
