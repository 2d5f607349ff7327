"""Folders of results, names and figures as text. No paddle here: scripts need it before the runtime is set up."""

from pathlib import Path
from typing import Any

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


def figure(value: float | None) -> str:
    """An AUROC with the published three decimals, `n/a` where it could not be measured."""
    return "n/a" if value is None else f"{value:.3f}"


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
