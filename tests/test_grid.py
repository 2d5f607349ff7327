"""Several configs and seeds: what is trained, and the table that ends it."""

import json

import pytest

from deploy.common.cli import UserError
from utils.grid import Job, grid_table, make_grid, mean_and_spread

CONFIGS = ["configs/auto.yaml", "configs/resnet18.yaml"]


def test_all_configs_are_trained_with_all_seeds_each_in_a_folder_of_its_own():
    cells = make_grid(CONFIGS, [0, 1], ["epochs=3"], "data", "exp")
    assert [cell.folder for cell in cells] == ["auto-0", "auto-1", "resnet18-0", "resnet18-1"]
    assert [cell.config.seed for cell in cells] == [0, 1, 0, 1]
    assert {cell.config.epochs for cell in cells} == {3}
    words = ["-cfg", CONFIGS[1], "--data", "data", "--exp_dir", "exp/resnet18-1", "-o", "epochs=3", "-o", "seed=1"]
    assert cells[3].options == words
    assert Job("bottle", cells[3]).name == "resnet18-1/bottle"


def test_one_config_alone_is_trained_where_it_always_was():
    (cell,) = make_grid(CONFIGS[1:], None, [], "data", "exp")
    assert cell.options == ["-cfg", CONFIGS[1], "--data", "data", "--exp_dir", "exp"]
    assert Job("bottle", cell).name == "bottle"
    (cell,) = make_grid(CONFIGS[1:], [3], [], "data", "exp")  # a grid that other seeds may join
    assert Job("bottle", cell).name == "resnet18-3/bottle"


def test_configs_that_would_share_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="have the same name"):
        make_grid(["configs/auto.yaml", str(tmp_path / "auto.yaml")], None, [], "data", "exp")


def test_the_table_has_means_and_spreads_and_leaves_out_what_failed(tmp_path):
    cells = make_grid(CONFIGS, [0, 1], [], "data", "exp")
    for cell, image in zip(cells[:3], (0.9, 0.92, 0.8), strict=True):  # the last evaluation failed
        row = {"image_auroc": image, "pixel_auroc": None}
        (tmp_path / cell.folder).mkdir()
        (tmp_path / cell.folder / "eval.json").write_text(json.dumps({"categories": {"part": row}, "mean": row}))
    lines = [" ".join(line.split()) for line in grid_table(tmp_path, cells).splitlines()]
    assert lines[0] == "config category seeds image AUROC pixel AUROC"
    assert lines[1:] == [
        "auto part 2 0.910 ± 0.014 n/a",
        "auto mean 2 0.910 ± 0.014 n/a",
        "resnet18 part 1 0.800 n/a",
        "resnet18 mean 1 0.800 n/a",
    ]


@pytest.mark.parametrize(("values", "text"), [([], "n/a"), ([0.5], "0.500"), ([0.5, 0.7], "0.600 ± 0.141")])
def test_a_spread_is_told_of_several_values_only(values, text):
    assert mean_and_spread(values) == text
