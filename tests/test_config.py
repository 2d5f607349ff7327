"""The configuration: published values, overrides, and one clear line for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from deploy.common.cli import UserError
from utils.config import (
    Config,
    SelectionWeights,
    keys_that_decide,
    listing,
    load_config,
    main,
    markdown,
    parse_config,
)

PATH = "configs/resnet18.yaml"
MODEL = {
    "input_size": 256,
    "backbone_name": "resnet18",
    "channels": [64, 128, 256],
    "scales": [4, 8, 16],
    "use_norm": True,
    "momentum": 0.95,
    "flow_step": 4,
    "hidden_ratio": 1.06,
    "conv3x3_only": True,
    "clamp": 2.0,
}
NEEDED = [key for key in MODEL if key not in ("channels", "scales")]  # those two the backbone tells
TRAINING = {
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "clip_norm": 0.9,
    "batch_size": 32,
    "epochs": 500,
    "patience": 30,
    "eval_interval": 1,
    "seed": 0,
    "selection_weights": {"image": 0.5, "pixel": 0.5},
    "pretrained": "imagenet",
    "mask_rule": "published",
}


def written(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides, path=PATH):
    """The error's message, as the one line that the user sees."""
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(("key", "value"), (MODEL | TRAINING).items())
def test_published_value(config, key, value):
    assert config.as_dict()[key] == value


def test_the_file_holds_every_key_and_no_other(config):
    with open(PATH, encoding="utf-8") as file:
        assert yaml.safe_load(file) == config.as_dict()


def test_a_file_with_the_published_keys_alone_will_do(tmp_path, config):
    assert load_config(written(tmp_path, yaml.safe_dump(MODEL))) == config


def test_as_dict_makes_the_same_config_again(config):
    changed = dataclasses.replace(config, lr=0.1 + 0.2, selection_weights=SelectionWeights(image=1.0, pixel=0.0))
    assert parse_config(yaml.safe_load(yaml.safe_dump(changed.as_dict())), "again") == changed


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lr=0.0005", "lr", 0.0005),
        ("lr=1e-3", "lr", 0.001),
        ("lr=1", "lr", 1.0),
        ("weight_decay=0", "weight_decay", 0.0),
        ("use_norm=false", "use_norm", False),
        ("pretrained=offline", "pretrained", "offline"),
        ("mask_rule=half", "mask_rule", "half"),
        ("seed=7", "seed", 7),
        ("selection_weights.image=1", "selection_weights", SelectionWeights(1.0, 0.5)),
        ("selection_weights={image: 0, pixel: 2}", "selection_weights", SelectionWeights(0.0, 2.0)),
    ],
)
def test_override(config, override, key, value):
    changed = load_config(PATH, [override])
    assert getattr(changed, key) == value
    assert type(getattr(changed, key)) is type(value)
    assert dataclasses.replace(changed, **{key: getattr(config, key)}) == config  # and nothing else


@pytest.mark.parametrize(
    ("text", "kept", "size"),
    [("64", 64, (64, 64)), ("[64, 96]", [64, 96], (64, 96)), ("[32, 4096]", [32, 4096], (32, 4096))],
)
def test_a_size_is_one_number_or_height_and_width(text, kept, size):
    config = load_config(PATH, [f"input_size={text}"])
    assert config.size == size
    assert config.as_dict()["input_size"] == kept
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.as_dict())), "again") == config


@pytest.mark.parametrize(
    ("overrides", "pixels"),
    [
        ([], 1),
        (["top_share=0.5"], 1),
        (["image_score=top"], 1966),  # 0.03 of 65536
        (["image_score=top", "top_share=0.01", "input_size=[64,96]"], 61),
        (["image_score=top", "top_share=0.01", "input_size=original", "tile=[64,96]"], 61),
        (["image_score=top", "top_share=1e-9"], 1),
        (["image_score=top", "top_share=1"], 65536),
    ],
)
def test_how_many_pixels_make_the_image_score(overrides, pixels):
    config = load_config(PATH, overrides)
    assert config.score_pixels == pixels
    top = config.image_score == "top"
    assert config.scoring == {"image_score": config.image_score, "top_share": config.top_share if top else None}


def test_channels_and_scales_may_be_left_out(tmp_path):
    config = load_config(written(tmp_path, yaml.safe_dump({key: MODEL[key] for key in NEEDED})))
    assert (config.channels, config.scales) == (None, None)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.as_dict())), "again") == config


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_and_says_of_the_model_all_there_is_to_say(path):
    config = load_config(path)
    assert config.backbone_name in path.stem or path.stem == "auto"
    assert set(NEEDED) <= yaml.safe_load(path.read_text(encoding="utf-8")).keys()


def test_later_overrides_win_and_options_win_over_them():
    config = load_config(PATH, ["epochs=3", "epochs=4", "batch_size=5"], batch_size=6, eval_interval=None)
    assert (config.epochs, config.batch_size, config.eval_interval) == (4, 6, 1)


@pytest.mark.parametrize(
    ("overrides", "options", "steps", "epochs"),
    [
        ([], {"epochs": None}, 240, 500),
        (["steps=7"], {}, 7, 500),
        ([], {"epochs": 3}, None, 3),
        (["epochs=3"], {}, None, 3),
        (["epochs=3", "steps=null"], {}, None, 3),
    ],
)
def test_whoever_gives_epochs_wants_these_and_no_budget_in_steps(overrides, options, steps, epochs):
    config = load_config("configs/auto.yaml", overrides, **options)
    assert (config.steps, config.epochs) == (steps, epochs)


@pytest.mark.parametrize("name", ["resnet18_few.yaml", "resnet18_stable.yaml"])
def test_who_names_a_config_that_there_was_is_told_what_to_use(name):
    with pytest.raises(UserError, match=rf"configs/{name}: cannot be read .*; configs/auto\.yaml is in its place$"):
        load_config(f"configs/{name}")


def test_epochs_and_steps_cannot_both_be_given():
    for overrides, options in ((["epochs=3", "steps=7"], {}), (["steps=7"], {"epochs": 3})):
        with pytest.raises(UserError, match="epochs and steps: give one of the two"):
            load_config("configs/auto.yaml", overrides, **options)


def test_a_dotted_override_leaves_its_neighbours(tmp_path):
    path = written(tmp_path, yaml.safe_dump(MODEL))  # without selection_weights
    assert load_config(path, ["selection_weights.pixel=0"]).selection_weights == SelectionWeights(0.5, 0.0)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        # unknown keys
        ("learning_rate=1", "learning_rate"),
        ("selection_weights.images=1", "selection_weights.images"),
        ("a.b=1", "a"),
        ("1=2", "1"),
        # wrong types
        ("lr=fast", "lr"),
        ("lr=", "lr"),
        ("lr=true", "lr"),
        ("lr=[1]", "lr"),
        ("epochs=3.5", "epochs"),
        ("epochs=3.0", "epochs"),
        ("epochs=true", "epochs"),
        ("epochs=many", "epochs"),
        ("use_norm=1", "use_norm"),
        ("use_norm=sure", "use_norm"),
        ("channels=64", "channels"),
        ("channels=[64, a, 256]", "channels[1]"),
        ("channels=[64, true, 256]", "channels[1]"),
        ("channels.0=64", "channels"),
        ("seed.x=1", "seed"),
        ("selection_weights=1", "selection_weights"),
        ("selection_weights.image=much", "selection_weights.image"),
        # values that make no sense
        ("lr=.nan", "lr"),
        ("lr=nan", "lr"),
        ("lr=.inf", "lr"),
        ("lr=0", "lr"),
        ("lr=-1", "lr"),
        ("weight_decay=.nan", "weight_decay"),
        ("weight_decay=.inf", "weight_decay"),
        ("weight_decay=-1", "weight_decay"),
        ("clip_norm=0", "clip_norm"),
        ("clamp=0", "clamp"),
        ("hidden_ratio=-1", "hidden_ratio"),
        ("momentum=1.5", "momentum"),
        ("momentum=.nan", "momentum"),
        ("epochs=0", "epochs"),
        ("epochs=100000000000000000000", "at most 1000000"),
        ("batch_size=0", "batch_size"),
        ("flow_step=0", "flow_step"),
        ("input_size=16", "input_size"),
        ("seed=-1", "seed"),
        ("eval_interval=0", "eval_interval"),
        ("patience=0", "patience"),
        ("selection_weights.image=-1", "selection_weights.image"),
        ("selection_weights.image=.inf", "selection_weights.image"),
        ("selection_weights={image: 0, pixel: 0}", "selection_weights"),
        ("pretrained=true", "pretrained"),
        ("mask_rule=most", "mask_rule"),
        ("image_score=mean", "image_score"),
        ("top_share=3", "top_share"),
        ("top_share=0", "top_share"),
        ("scales=[0, 8, 16]", "scales[0]"),
        ("input_size=[64]", "input_size"),
        ("input_size=[]", "input_size"),
        ("input_size=[64, 64, 3]", "input_size"),
        ("input_size=[64, 16]", "input_size[1]"),
        ("input_size=[5000, 64]", "input_size[0]"),
        ("input_size=5000", "input_size"),
        ("input_size=[64, 96.0]", "input_size[1]"),
        ("input_size=original", "input_size original needs tiles"),
        ("tile=8", "tile"),
        ("tile=[64]", "tile"),
        ("tile=original", "tile"),
        ("tile_overlap=1", "tile_overlap"),
        ("tiles_per_epoch=0", "tiles_per_epoch"),
        ("input_size=[64, [96]]", "input_size[1]"),
        ("input_size={height: 64}", "input_size"),
        ("input_size=large", "input_size"),
        ("input_size=", "input_size"),
        ("backbone_name=18", "backbone_name"),
        # not key=value, not YAML
        ("lr", "lr"),
        ("=3", "=3"),
        ("lr=[1", "lr"),
        ("lr=@", "lr"),
        ("seed=2022-13-45", "seed"),
        ("lr=1" + "0" * 400, "lr"),
        ("seed=" + "9" * 30, "seed"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, named):
    message = refusal(override).partition("known keys")[0]
    assert re.search(rf"(?<![\w.]){re.escape(named)}(?!\w)", message)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(tmp_path, key):
    path = written(tmp_path, yaml.safe_dump({k: v for k, v in MODEL.items() if k != key}))
    message = refusal(path=path)
    assert key in message
    assert "missing" in message


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "just text", "lr: [1", "a: b: c", "lr: 2022-13-45", "\t- x: y", "? [a]\n: 1", "42", "\0"],
)
def test_a_file_that_holds_no_keys_is_named(tmp_path, text):
    path = written(tmp_path, text)
    assert "my.yaml" in refusal(path=path)


def test_an_unknown_key_in_the_file_names_file_and_key(tmp_path):
    message = refusal(path=written(tmp_path, yaml.safe_dump(MODEL | {"chanels": 1})))
    assert "my.yaml" in message
    assert "chanels" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00lr")
    for name in ("absent.yaml", "binary.yaml", "."):
        assert str(tmp_path / name) in refusal(path=tmp_path / name)


def test_a_file_cannot_run_code(tmp_path):
    trap = tmp_path / "trap"
    path = written(tmp_path, f"lr: !!python/object/apply:os.system ['touch {trap}']\n")
    assert "my.yaml" in refusal(path=path)
    assert not trap.exists()


def flat(values, prefix=""):
    """Each key of a config's dictionary, dotted within groups, and its value."""
    for name, value in values.items():
        yield from flat(value, f"{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def test_the_listing_has_every_key_and_what_it_takes(config, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["config"])
    main()
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split("  ")[0] == "key"
    assert [line.split()[0] for line in lines] == [name for name, _ in flat(config.as_dict())]
    rows = {line.split()[0]: re.split(r" {2,}", line, maxsplit=1)[1] for line in lines}
    assert re.match(r"int, list\[int\], original +≥ 32, ≤ 4096 +side of", rows["input_size"])
    assert re.match(r"int, list\[int\] +null +≥ 32, ≤ 4096 +side of the square tiles", rows["tile"])
    assert re.match(r"list\[int\] +null +≥ 1 +input size /", rows["scales"])
    assert re.match(r"float +0\.001 +> 0 +learning rate", rows["lr"])
    assert re.match(r"published, half, nonzero +published +mask pixels", rows["mask_rule"])
    assert re.match(r"float +0\.5 +≥ 0 +weight of the image", rows["selection_weights.image"])


BEYOND = {"≥": -1, ">": 0, "≤": 1}


@pytest.mark.parametrize(
    ("name", "kinds", "sign", "number"),
    [
        (name, kinds, *bound.split())
        for name, kinds, _, bounds, _ in listing("en")[1:]
        for bound in bounds.split(", ")
        if bound
    ],
)
def test_beyond_a_listed_bound_is_an_error_that_says_it(name, kinds, sign, number):
    value = yaml.safe_load(number) + BEYOND[sign]
    message = refusal(f"{name}={[value] if kinds == 'list[int]' else value}")
    assert re.search(rf"{name}(\[0\])? must be (at least|at most|greater than) {number}, not ", message)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documentation_has_the_table_of_the_code(language):
    command = f"python -m utils.config --markdown {language}"
    text = Path(f"docs/{language}/configuration.md").read_text(encoding="utf-8")
    table = text.partition(f"<!-- made by: {command} -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert table == markdown(language), f"put between the markers what this prints: {command}"


def test_every_key_has_a_meaning_in_both_languages():
    rows = [row for language in ("en", "zh") for row in listing(language)]
    assert all(row[-1] for row in rows)
    assert len({row[-1] for row in rows}) == len(rows)


def test_what_each_key_decides():
    """--resume and a checkpoint's model go by it."""
    model = {*NEEDED, "scales", "tile", "blocks", "share_subnet"} - {"momentum"}
    assert set(keys_that_decide("model")) == model
    assert set(keys_that_decide("resume")) == {"selection", "holdout", "ema_decay"}
    steps = {"momentum", "seed", "batch_size", "lr", "lr_schedule", "weight_decay", "clip_norm", "feature_noise"}
    others = {
        "tile_overlap",
        "tiles_per_epoch",
        "mask_rule",
        "image_score",
        "top_share",
        "selection_weights",
        "white_level",
    }
    assert set(keys_that_decide("training")) == steps | others


def test_a_config_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert isinstance(config, Config)
