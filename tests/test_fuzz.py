"""Whatever stands in a file or an upload: the readers take it, or refuse it in one line; they never fail otherwise."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.mvtec import list_categories, load_category, load_ground_truth, read_batches
from deploy.common.cli import UserError
from deploy.common.imaging import preprocess, read_rgb
from deploy.description import read_description
from deploy.service.app import Limits, create_app
from models.fastflow import FastFlow
from tests import torch_files
from tests.serving import PREDICT, picture_file
from tests.test_serve import served
from utils.checkpoint import load_checkpoint, load_model
from utils.config import load_config
from utils.history import best_row
from utils.loss_scale import LossScale
from utils.results import describe_backbone
from utils.thresholds import load_thresholds
from utils.training import Training, training_step
from utils.weights import read_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged metadata
# The same examples every time: a test that fails by chance helps nobody.
bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole):
    """The bytes with some of them changed, taken out or put in."""
    data = bytearray(draw(whole) if isinstance(whole, st.SearchStrategy) else whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        taken = draw(st.sampled_from([0, 1, 1, 1, 2, 8, len(data)]))
        data[start : start + taken] = draw(st.binary(max_size=4))
    return bytes(data)


# What a pickle can hold beside them.
ARRAYS = st.builds(
    lambda shape, dtype: np.ones(shape, dtype),
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from(["f2", "f4", "f8", "i8", "?"]),
)
NUMBERS = ARRAYS | ARRAYS.filter(lambda array: array.size == 1).map(lambda array: array.flat[0])
PICKLED = VALUES | NUMBERS | st.lists(NUMBERS, max_size=2)


def changed(draw, content, values=VALUES):
    """The nested dictionary with one of its entries replaced, removed or added."""
    content = dict(content)
    key = draw(st.sampled_from([*content, "x"]))
    if isinstance(content.get(key), dict) and content[key] and draw(st.booleans()):
        return {**content, key: changed(draw, content[key], values)}
    if draw(st.integers(0, 5)) == 0:
        content.pop(key, None)
        return content
    return {**content, key: draw(values)}


def attempt(read, *arguments):
    """What it returns, or None where it refuses; whatever else it raises fails the test."""
    try:
        return read(*arguments)
    except UserError as error:
        assert str(error)
        return None


# ---- checkpoints


@pytest.fixture(scope="module")
def training(config, tmp_path_factory):
    """A training after a step, and what its checkpoint holds."""
    config = dataclasses.replace(config, input_size=32, flow_step=1, ema_decay=0.9)
    training = Training(FastFlow(config), config)
    training.scale = LossScale()
    training.backbone = {"source": "downloaded", "file": "x", "sha256": "y"}
    training.model.train()
    with paddle.utils.unique_name.guard():  # the optimizer's names count the optimizers of a process: other tests' too
        one_step(training)
    training.record(1.0, 0.5, 0.5, None, 1.0)
    content = training.content()
    content["optimizer_state_dict"] = {name: v.numpy() for name, v in content["optimizer_state_dict"].items()}
    path = tmp_path_factory.mktemp("whole") / "last.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=4))
    training.resume(path)  # whole, it is not refused
    return training, content


def one_step(training):
    training_step(training.model, training.optimizer, training.model.feature_extractor(paddle.rand([2, 3, 32, 32])))


SMALL = io.BytesIO()
paddle.save({"epoch": 1, "model_state_dict": {"a": paddle.ones([3])}, "history": [{"loss": 0.5}]}, SMALL)


@bounded
@given(data=st.binary(max_size=200) | damaged(SMALL.getvalue()) | damaged(PICKLED.map(pickle.dumps)))
def test_a_checkpoint_of_any_bytes(tmp_path, data):
    (tmp_path / "last.pdparams").write_bytes(data)
    attempt(load_checkpoint, tmp_path / "last.pdparams")


@settings(bounded, max_examples=60)
@given(data=st.data())
def test_a_checkpoint_of_any_content(tmp_path, training, data):
    training, content = training
    content = changed(data.draw, content, PICKLED)
    path = tmp_path / "last.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=4))
    training.history = []
    attempt(training.resume, path)
    if training.history:  # what train.py does with it next
        assert best_row(training.history).epoch == content["epoch"]
        describe_backbone(training.backbone)
        one_step(training)
        training.average.update()
        training.content()
    loaded = attempt(load_model, training.config, path, [])
    if loaded:  # what eval.py and export_model.py write of it
        json.dumps(loaded[1].get("backbone"))
        yaml.safe_dump(loaded[1].get("backbone"))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("part", ["optimizer_state_dict", "average"])
def test_moments_and_averages_of_another_precision_are_refused(tmp_path, training, dtype, part):
    """Paddle would take them and fail at the first step."""
    training, content = training
    whole = content[part]["parameters"] if part == "average" else content[part]
    arrays = {name: np.asarray(value).astype(dtype) for name, value in whole.items()}
    content = {**content, part: {"steps": 1, "parameters": arrays} if part == "average" else arrays}
    path = tmp_path / "last.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UserError, match=r"last\.pdparams"):
        training.resume(path)


def test_a_warning_names_training_settings_that_change(tmp_path, training, capsys, monkeypatch):
    training, content = training
    config, path = training.config, tmp_path / "last.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=4))

    def warning(**changes):
        monkeypatch.setattr(training, "config", dataclasses.replace(config, **changes))
        training.resume(path)
        return capsys.readouterr().err

    assert warning(epochs=900, amp=True, patience=3, eval_interval=2, pretrained="offline") == ""
    assert warning(lr=0.5, batch_size=7) == (
        f"warning: {path}: --resume goes on with other settings (batch_size 32 is now 7, lr 0.001 is now 0.5), so not "
        "to the losses of one training\n"
    )
    assert "seed 0 is now 3" in warning(seed=3)
    assert "epochs 500 is now 900" in warning(lr_schedule="cosine", epochs=900)


# ---- weights of torch

FORMS = (torch_files.write_archive, torch_files.write_pickles)
NUMBERS = np.arange(12, dtype="<f4")
STORED = torch_files.storage("0", "Float", len(NUMBERS))
CONTENT = torch_files.ordered({"a.weight": torch_files.tensor(STORED, 0, (3, 4), (4, 1)), "n": 7})


def read_torch(path):
    weights = attempt(read_weights, path)
    for value in weights.values() if isinstance(weights, dict) else ():
        if isinstance(value, np.ndarray) and value.size < 1000:
            value.sum()  # of numbers that are not there it would crash
    return weights


@settings(bounded, max_examples=300)
@given(data=st.data(), write=st.sampled_from(FORMS))
def test_weights_of_torch_of_any_bytes(tmp_path, data, write):
    path = write(tmp_path / "w.pth", CONTENT, {"0": NUMBERS})
    path.write_bytes(data.draw(damaged(path.read_bytes()) | st.binary(max_size=200)))
    read_torch(path)


@settings(bounded, max_examples=300)
@given(content=damaged(CONTENT), write=st.sampled_from(FORMS))
def test_weights_of_torch_of_any_pickle(tmp_path, content, write):
    read_torch(write(tmp_path / "w.pth", content, {"0": NUMBERS}))


@settings(bounded, max_examples=300)
@given(
    offset=st.integers(0, 13),
    axes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=3),
    write=st.sampled_from(FORMS),
)
def test_a_tensor_is_the_numbers_that_its_strides_say_or_refused(tmp_path, offset, axes, write):
    sizes, strides = tuple(size for size, _ in axes), tuple(stride for _, stride in axes)
    path = write(tmp_path / "w.pth", {"a": torch_files.tensor(STORED, offset, sizes, strides)}, {"0": NUMBERS})
    weights = read_torch(path)
    places = offset + sum(i * stride for i, stride in zip(np.indices(sizes), strides, strict=True))
    if np.max(places, initial=0) < len(NUMBERS):
        np.testing.assert_array_equal(weights["a"], NUMBERS[places])
    else:
        assert weights is None


# ---- YAML


CONFIG = yaml.safe_load(Path("configs/resnet18.yaml").read_text(encoding="utf-8"))
YAML_TEXT = st.text(st.sampled_from("ab1:-,.[]{}&*!|>'\"#%@?\\x0e~<=\n\t \x00\x85\ud800é"), max_size=60)


@bounded
@given(data=st.data())
def test_a_config_of_any_content(tmp_path, data):
    if data.draw(st.booleans()):
        text = yaml.safe_dump(changed(data.draw, CONFIG))
    else:
        text = data.draw(YAML_TEXT)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    attempt(load_config, tmp_path / "config.yaml")


@bounded
@given(overrides=st.lists(st.builds("{}={}".format, st.sampled_from([*CONFIG, "a.b", ""]), YAML_TEXT), max_size=3))
def test_overrides_of_any_content(overrides):
    attempt(load_config, "configs/resnet18.yaml", overrides)


@bounded
@given(data=st.data())
def test_descriptions_and_thresholds_of_any_content(tmp_path, data):
    files = {name: (tmp_path / name) for name in ("inference.json", "inference.pdiparams", "best.pdparams")}
    for file in files.values():
        file.touch()
    checksum = hashlib.sha256(b"").hexdigest()
    description = {
        "category": "bottle",
        "input_size": [32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "image_threshold": 0.5,
        "pixel_threshold": 0.5,
        "image_score": "top",
        "top_share": 0.5,
        "rule": "f1",
        "pixel_rule": "f1",
        "sha256": {name: checksum for name in files},
    }
    for name, content in (("inference.yml", description), ("thresholds.yaml", {**description, "sha256": checksum})):
        text = yaml.safe_dump(changed(data.draw, content)) if data.draw(st.booleans()) else data.draw(YAML_TEXT)
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    read = attempt(read_description, tmp_path)
    if read:
        height, width = read["input_size"]
        model_input = preprocess(np.zeros((2, 2, 3), np.uint8), height, width, read["mean"], read["std"])
        assert np.isfinite(model_input).all()
    attempt(load_thresholds, tmp_path / "best.pdparams", load_config("configs/resnet18.yaml"))


# ---- pictures


PICTURES = st.sampled_from(
    [picture_file(200, (9, 7), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")]
    + [picture_file(200, (9, 7), "TIFF", compression="tiff_lzw"), picture_file(9, (9, 7), "JPEG", progressive=True)]
)
FILES = st.binary(max_size=100) | PICTURES | damaged(PICTURES)


@settings(bounded, max_examples=400)
@given(data=FILES)
def test_a_picture_of_any_bytes(data):
    picture = attempt(read_rgb, Path("picture"), io.BytesIO(data), 1_000_000)
    assert picture is None or (picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3)


@bounded
@given(data=st.data())
def test_a_dataset_of_any_files(tmp_path, data):
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    folders = ["train/good", "test/good", "test/crack", "ground_truth/crack", "test", "train", "ground_truth/good"]
    names = ["0.png", "0_mask.png", "1.jpg", "1_mask.png", ".2.png", "\udcff.png", "x\n.png", "good", "a.txt"]
    for _ in range(data.draw(st.integers(1, 8))):
        path = tmp_path / "data/part" / data.draw(st.sampled_from(folders)) / data.draw(st.sampled_from(names))
        kind = data.draw(st.sampled_from(["file", "file", "file", "folder", "pipe", "link", "broken link"]))
        if os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            elif "link" in kind:
                path.symlink_to(path.name if kind == "broken link" else "..")
            else:
                path.write_bytes(data.draw(FILES))
        except OSError:  # a file stands where the folder should
            continue

    def read():
        (name,) = list_categories(tmp_path / "data")
        category = load_category(tmp_path / "data", name)
        load_ground_truth(category.test, (8, 8), "half")
        for _ in read_batches([*category.train, *(image.path for image in category.test)], 2, (8, 8)):
            pass

    attempt(read)


# ---- uploads


@pytest.fixture(scope="module")
def client():
    with TestClient(
        create_app({"bottle": served()}, Limits(pixels=1_000_000)), raise_server_exceptions=False
    ) as client:
        yield client


def assert_answered(answer):
    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or answer.json()["detail"]


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
    b'--x\r\nContent-Disposition: form-data; name="map"\r\n\r\ntrue\r\n--x--\r\n'
)
KINDS = ["multipart/form-data; boundary=x", "multipart/form-data", "application/json", "text/plain", "é", ""]


@bounded
@given(body=damaged(FILES.map(lambda file: FORM % file)), kind=st.sampled_from(KINDS[:1] * 6 + KINDS))
def test_a_form_of_any_bytes(client, body, kind):
    assert_answered(client.post(PREDICT, content=body, headers={"Content-Type": kind.encode()}))


@bounded
@given(file=FILES, data=st.data())
def test_json_of_any_content(client, file, data):
    body = {"image": base64.b64encode(file).decode(), "map": True, "image_threshold": 0.5}
    text = json.dumps(changed(data.draw, body), default=str)
    body = data.draw(st.just(text.encode()) | damaged(text.encode()))
    assert_answered(client.post(PREDICT, content=body, headers={"Content-Type": "application/json"}))
