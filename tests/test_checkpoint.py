"""Checkpoints: published names, honest errors, and nothing in a file is ever run."""

import builtins
import dataclasses
import os
import pickle

import numpy as np
import paddle
import pytest

from deploy.common.cli import UserError
from models.fastflow import FastFlow
from utils.checkpoint import load_checkpoint, load_model, published_state, save_checkpoint, set_published_state
from utils.pickles import load_pickle
from utils.results import OFFLINE

STEP = "nf_flows.0.module_list.0"
SUBNET_2 = {f"{STEP}.subnet_2.0.weight": np.ones((33, 32, 3, 3), np.float32), f"{STEP}.subnet_2.2.bias": np.ones(64)}


def randomised(config, seed):
    """A model whose every array differs from every other model's, the permutations included."""
    random = np.random.default_rng(seed)
    model = FastFlow(config)
    for value in model.state_dict().values():
        value.set_value(random.random(value.shape, np.float32) + 0.5)
    for flow in model.nf_flows:
        for step in flow.module_list:
            step.permutation.set_value(random.permutation(len(step.permutation)))
    return model


@pytest.fixture(scope="module")
def source(config):
    return randomised(config, 1)


@pytest.fixture(scope="module")
def state(source):
    return published_state(source)


@pytest.fixture(scope="module")
def target(config):
    return randomised(config, 2)


@pytest.fixture
def unchanged(target):
    """After the test `target` must be what it was before."""
    before = published_state(target)
    yield
    for name, value in published_state(target).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


# ---- the published names


def test_a_state_makes_the_same_model_again(config, source, state):
    other = randomised(config, 3)
    set_published_state(other, state, "state")
    for name, value in published_state(other).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    source.eval()
    other.eval()
    x = paddle.to_tensor(np.random.default_rng(0).random((1, 64, 4, 4), np.float32))
    np.testing.assert_array_equal(other.nf_flows[0](x)[0].numpy(), source.nf_flows[0](x)[0].numpy())


def test_w_perm_as_a_1x1_convolution_permutes_as_the_step_does(source, state):
    kernel, inverse = state[f"{STEP}.w_perm"], state[f"{STEP}.w_perm_inv"]
    assert kernel.shape == inverse.shape == (64, 64, 1, 1)
    assert kernel.dtype == inverse.dtype == np.float32
    x = paddle.rand([1, 64, 3, 3])
    y = paddle.nn.functional.conv2d(x, paddle.to_tensor(kernel))
    permutation = source.nf_flows[0].module_list[0].permutation
    np.testing.assert_array_equal(y.numpy(), paddle.index_select(x, permutation, axis=1).numpy())
    np.testing.assert_array_equal(paddle.nn.functional.conv2d(y, paddle.to_tensor(inverse)).numpy(), x.numpy())


def test_the_state_holds_no_index_and_no_fixed_matrix(state):
    allowed = ("feature_extractor.", "norms.", "nf_flows.")
    assert all(name.startswith(allowed) for name in state)
    assert not any(name.endswith("permutation") for name in state)


def test_a_state_is_a_copy(config):
    model = FastFlow(config)
    state = published_state(model)
    model.norms[0].weight.set_value(paddle.full([64], 3.0))
    assert (state["norms.0.weight"] == 1).all()


def test_the_dead_second_network_is_ignored(target, state):
    set_published_state(target, state | SUBNET_2, "published")
    np.testing.assert_array_equal(published_state(target)["norms.0.weight"], state["norms.0.weight"])


def test_a_second_network_that_is_used_is_kept_and_needed(config, state):
    own = dataclasses.replace(config, share_subnet=False)
    source, target = randomised(own, 3), randomised(own, 4)
    both = published_state(source)
    assert both.keys() - state.keys() == {name.replace("subnet.", "subnet_2.") for name in state if "subnet." in name}
    set_published_state(target, both, "ours")
    for name, value in published_state(target).items():
        np.testing.assert_array_equal(value, both[name], err_msg=name)
    with pytest.raises(UserError, match=r"subnet_2\.0\.weight is missing"):
        set_published_state(target, state, "published")


@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoint_belongs_to_its_subnets(tmp_path, config, trained):
    theirs = dataclasses.replace(config, share_subnet=trained)
    content = {"epoch": 1, "model_state_dict": published_state(FastFlow(theirs)), "config": theirs.as_dict()}
    save_checkpoint(tmp_path / "best.pdparams", content)
    other = dataclasses.replace(config, share_subnet=not trained)
    with pytest.raises(UserError, match=f"trained with share_subnet {trained}, the config says {not trained}"):
        load_model(other, tmp_path / "best.pdparams")
    assert load_model(other, tmp_path / "best.pdparams", [])[0].config.share_subnet == trained


def test_a_published_file_is_no_model_of_two_subnets(config, source, state, tmp_path):
    """Its second subnets, which nothing was learnt by, have all the names and shapes that such a model asks for."""
    two = dataclasses.replace(config, share_subnet=False)
    names = published_state(FastFlow(two))
    second = {name: names[name] for name in names if ".subnet_2." in name}
    save_checkpoint(tmp_path / "best.pdparams", {"epoch": 0, "model_state_dict": state | second})
    load_model(config, tmp_path / "best.pdparams")
    with pytest.raises(UserError, match="trained with share_subnet True, the config says False"):
        load_model(two, tmp_path / "best.pdparams")


def test_tensors_and_other_floats_are_taken(target, state):
    changed = state | {"norms.0.weight": state["norms.0.weight"].astype(np.float64)}
    changed["norms.0.bias"] = paddle.to_tensor(state["norms.0.bias"])
    set_published_state(target, changed, "state")
    assert published_state(target)["norms.0.weight"].dtype == np.float32


KERNEL = np.eye(64, dtype=np.float32)[:, :, None, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norms.0.weight", None),
        ("nf_flows.2.module_list.3.subnet.2.bias", None),
        ("feature_extractor.layer3.1.bn2._variance", None),
        (f"{STEP}.w_perm", None),
        ("norms.0.weight", np.ones(63)),
        ("norms.0.weight", np.ones((64, 1))),
        (f"{STEP}.w_perm", np.ones((64, 64))),
        ("norms.3.weight", np.ones(64)),
        ("feature_extractor.fc.weight", np.ones(64)),
        (f"{STEP}.w_perm", np.zeros_like(KERNEL)),
        (f"{STEP}.w_perm", np.ones_like(KERNEL)),
        (f"{STEP}.w_perm", KERNEL * 0.5),
        (f"{STEP}.w_perm", KERNEL * np.nan),
        (f"{STEP}.w_perm", KERNEL[[0, *range(63)]]),
        # not numbers at all
        ("norms.0.weight", "text"),
        ("norms.0.weight", {}),
        ("norms.0.weight", np.full(64, "x")),
        ("norms.0.weight", np.full(64, None)),
        ("norms.0.weight", np.full(64, 1j)),
        ("norms.0.weight", [[1, 2], [3]]),
        (f"{STEP}.w_perm", [[1], [2, 3]]),
        (f"{STEP}.w_perm", np.full((64, 64, 1, 1), "x")),
        (3, np.ones(64)),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(target, state, unchanged, name, value):
    wrong = {k: v for k, v in state.items() if k != name} if value is None else state | {name: value}
    with pytest.raises(UserError, match=rf"stranger\.pdparams.*{name}"):
        set_published_state(target, wrong, "stranger.pdparams")


@pytest.mark.parametrize("wrong", [None, [], "text", {}, np.ones(3)])
def test_no_state_at_all_is_a_user_error(target, unchanged, wrong):
    with pytest.raises(UserError, match="source"):
        set_published_state(target, wrong, "source")


@pytest.mark.parametrize("name", ["norms.0.weight", "feature_extractor.layer3.1.bn2._variance"])
def test_a_number_that_is_not_finite_is_named_and_changes_nothing(target, state, unchanged, name):
    damaged = state | {name: np.where(np.arange(state[name].size) == 1, np.inf, state[name])}
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        set_published_state(target, damaged, "state")


def test_many_problems_are_still_one_readable_line(target):
    with pytest.raises(UserError) as error:
        set_published_state(target, {f"{i}.{STEP}": np.ones(1) for i in range(100)}, "source")
    assert len(str(error.value)) < 1000


# ---- files


def checkpoint_of(model, optimizer=None):
    return {
        "epoch": 7,
        "model_state_dict": published_state(model),
        "optimizer_state_dict": optimizer.state_dict() if optimizer else {},
    }


def test_a_file_of_ours_is_read_by_plain_paddle(tmp_path, source, state):
    optimizer = paddle.optimizer.Adam(parameters=[source.norms[0].weight])
    save_checkpoint(tmp_path / "best.pdparams", checkpoint_of(source, optimizer) | {"history": [{"epoch": 1}]})
    loaded = paddle.load(str(tmp_path / "best.pdparams"))
    assert {"epoch", "model_state_dict", "optimizer_state_dict"} <= loaded.keys()
    assert loaded["epoch"] == 7
    assert loaded["model_state_dict"].keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(np.asarray(loaded["model_state_dict"][name]), value, err_msg=name)


def test_a_file_of_ours_makes_the_same_model_again(tmp_path, config, source, state):
    save_checkpoint(tmp_path / "best.pdparams", checkpoint_of(source))
    model, checkpoint = load_model(config, tmp_path / "best.pdparams")
    assert checkpoint["epoch"] == 7
    assert not model.training
    for name, value in published_state(model).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_published_file_loads(tmp_path, config, source, state, protocol):
    """As the published code writes it: tensors, kernels for the permutations, the dead networks, any protocol."""
    layer_state = {name: paddle.to_tensor(value) for name, value in (state | SUBNET_2).items()}
    optimizer = paddle.optimizer.Adam(parameters=[source.norms[0].weight])
    content = {"epoch": 3, "model_state_dict": layer_state, "optimizer_state_dict": optimizer.state_dict()}
    paddle.save(content, str(tmp_path / "best.pdparams"), protocol=protocol)
    model, checkpoint = load_model(config, tmp_path / "best.pdparams")
    assert checkpoint["epoch"] == 3
    np.testing.assert_array_equal(published_state(model)[f"{STEP}.w_perm"], state[f"{STEP}.w_perm"])


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_plain_state_dict_of_paddle_is_read(tmp_path, protocol):
    layer = paddle.nn.Linear(2, 3)
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"), protocol=protocol)
    loaded = load_pickle(tmp_path / "layer.pdparams")
    np.testing.assert_array_equal(loaded["weight"], layer.weight.numpy())
    np.testing.assert_array_equal(loaded["bias"], layer.bias.numpy())


def test_a_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pdparams"
    save_checkpoint(path, {"epoch": 1, "model_state_dict": {}})
    before = path.read_bytes()

    def fail(content, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paddle, "save", fail)
    with pytest.raises(UserError, match=r"last\.pdparams.*No space"):
        save_checkpoint(path, {"epoch": 2, "model_state_dict": {}})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pdparams"]


def refused(tmp_path, data):
    """`load_checkpoint` of these bytes is a UserError that names the file."""
    path = tmp_path / "best.pdparams"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"best\.pdparams"):
        load_checkpoint(path)


WHOLE = pickle.dumps({"epoch": 1, "model_state_dict": {"a": np.arange(1000.0)}})
RECURSIVE: list = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize("data", [b"", b"\0", b"text\n", WHOLE[:-1], WHOLE[:100], WHOLE[50:], b"\x80\xff" + WHOLE])
def test_a_damaged_file_is_a_user_error(tmp_path, data):
    refused(tmp_path, data)


@pytest.mark.parametrize(
    "content",
    [
        [1],
        "text",
        None,
        {},
        {"epoch": 1},
        {"model_state_dict": {}},
        np.ones(3),
        RECURSIVE,
        {"conv1.weight": np.ones(3)},
    ],
)
def test_something_else_than_a_checkpoint_is_a_user_error(tmp_path, content):
    refused(tmp_path, pickle.dumps(content))


@pytest.mark.parametrize("change", [{"model_state_dict": None}, {"model_state_dict": [1]}, {"epoch": "x"}])
def test_a_checkpoint_of_wrong_parts_is_a_user_error(tmp_path, config, source, change):
    (tmp_path / "best.pdparams").write_bytes(pickle.dumps(checkpoint_of(source) | change))
    with pytest.raises(UserError, match=r"best\.pdparams"):
        load_model(config, tmp_path / "best.pdparams")


ARRAY = np.array([1, 2])
DOWNLOADED = {"source": "downloaded", "file": "x", "sha256": "y"}


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": ARRAY},
        {"config": ARRAY},
        {"config": {"flow_step": ARRAY}},
        {"config": {"selection": ARRAY}},
        {"config": {"use_norm": ARRAY}},
        {"config": {"input_size": ARRAY}},
        {"config": {"ema_decay": ARRAY}},
        {"config": {"selection_weights": ARRAY}},
        {"config": {"backbone_name": ["x"]}},
        {"backbone": ARRAY},
        {"backbone": DOWNLOADED | {"source": ARRAY}},
        {"backbone": DOWNLOADED | {"file": ARRAY}},
        {"backbone": DOWNLOADED | {"source": OFFLINE}},
        {"backbone": {"source": OFFLINE, "file": ARRAY, "sha256": None}},
        {"held_out": ARRAY},
        {"held_out": [ARRAY]},
        {"held_out": "a.png"},
        {"held_out": [3]},
    ],
)
def test_what_a_checkpoint_says_of_its_training_has_the_type_that_train_writes(tmp_path, change):
    path = tmp_path / "best.pdparams"
    path.write_bytes(pickle.dumps({"epoch": 1, "model_state_dict": {}} | change))
    with pytest.raises(UserError, match=rf"best\.pdparams: not a checkpoint.*{next(iter(change))}"):
        load_checkpoint(path)


def test_a_config_of_another_version_is_no_damage(tmp_path):
    content = {"epoch": 1, "model_state_dict": {}, "config": {"flow_step": 8, "of_a_later_version": 1}}
    (tmp_path / "best.pdparams").write_bytes(pickle.dumps(content))
    assert load_checkpoint(tmp_path / "best.pdparams") == content


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path):
    (tmp_path / "folder.pdparams").mkdir()
    for name in ("absent.pdparams", "folder.pdparams"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("trained", "asked"), [(64, [64, 64]), ([64, 64], 64), ([64, 96], [64, 96])])
def test_a_size_may_be_written_in_two_ways(tmp_path, config, source, trained, asked):
    content = checkpoint_of(source) | {"config": config.as_dict() | {"input_size": trained}}
    save_checkpoint(tmp_path / "best.pdparams", content)
    load_model(dataclasses.replace(config, input_size=asked), tmp_path / "best.pdparams")


@pytest.mark.parametrize(
    ("trained", "asked", "override"),
    [(64, [64, 96], "input_size=64"), ([64, 96], [96, 64], "'input_size=[64, 96]'"), ([64, 96], 64, "'input_size=[64")],
)
def test_another_size_is_refused_and_the_right_one_named(tmp_path, config, source, trained, asked, override):
    content = checkpoint_of(source) | {"config": config.as_dict() | {"input_size": trained}}
    save_checkpoint(tmp_path / "best.pdparams", content)
    with pytest.raises(UserError) as error:
        load_model(dataclasses.replace(config, input_size=asked), tmp_path / "best.pdparams")
    assert f"trained with input_size {trained}, the config says {asked}" in str(error.value)
    assert f"-o {override}" in str(error.value)


# ---- files that would run code


class Call:
    """Pickled, it is a call that the unpickler makes."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only what is callable can stand in the place of the function."""


def touch(path):
    return f"open({str(path)!r}, 'w').close()"


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(lambda trap: Call(os.system, f"touch {trap}"), id="os.system"),
        pytest.param(lambda trap: Call(builtins.eval, touch(trap)), id="eval"),
        pytest.param(lambda trap: Call(builtins.exec, touch(trap)), id="exec"),
        pytest.param(lambda trap: Call(open, str(trap), "w"), id="open"),
        pytest.param(lambda trap: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {trap}"), id="getattr"),
        pytest.param(lambda trap: Call(map, os.system, [f"touch {trap}"]), id="map"),
        pytest.param(lambda trap: Call(np.save, str(trap), np.ones(1)), id="numpy.save"),
        pytest.param(lambda trap: Call(np.memmap, str(trap), "u1", "w+", 0, (1,)), id="numpy.memmap"),
        pytest.param(lambda trap: Call(paddle.save, {}, str(trap)), id="paddle.save"),
    ],
)
@pytest.mark.parametrize(
    "nest",
    [
        pytest.param(lambda x: x, id="bare"),
        pytest.param(lambda x: {"epoch": 1, "model_state_dict": {"a": [(1, x)]}}, id="in containers"),
        pytest.param(lambda x: {"epoch": 1, "model_state_dict": np.array([x], dtype=object)}, id="in an array"),
        pytest.param(lambda x: {"epoch": x, "model_state_dict": {}}, id="as the epoch"),
    ],
)
def test_nothing_in_a_file_is_run(tmp_path, planted, nest):
    trap = tmp_path / "trap"
    refused(tmp_path, pickle.dumps(nest(planted(trap)), protocol=4))
    assert not trap.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'print(1)'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",  # a dotted name walks attributes
        b"\x80\x04\x8c\x05numpy\x8c\x0ff2py.os.system\x93.",
        b"cnumpy.core.multiarray\n__builtins__\n.",
        b"cmodels.fastflow\nFastFlow\n.",
        b"cos\nsystem\n.",
        b"cposix\nsystem\n.",
        b"c__main__\nx\n.",
        b"Pid\n.",  # a persistent id
        b"\x82\x01.",  # an extension code
    ],
)
def test_a_name_that_no_weights_file_needs_is_refused(tmp_path, data):
    refused(tmp_path, data)


def forged_dtype():
    """A dtype with an object field that says it has none: numpy would take the file's bytes for pointers."""
    return Call(np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))


RECONSTRUCT = np.empty(0).__reduce__()[0]
FROMBUFFER = np.empty(0).__reduce_ex__(5)[0]
SCALAR = np.float32(0).__reduce__()[0]


@pytest.mark.parametrize(
    "planted",
    [
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (4,), forged_dtype(), False, b"A" * 32)),
        Call(FROMBUFFER, b"A" * 32, forged_dtype(), (4,), "C"),
        Call(SCALAR, forged_dtype(), b"A" * 8),
        Call(np.ndarray, (4,), forged_dtype(), b"A" * 32),
    ],
    ids=["reconstruct", "frombuffer", "scalar", "ndarray"],
)
def test_bytes_of_a_file_never_become_pointers(tmp_path, planted):
    refused(tmp_path, pickle.dumps({"epoch": 1, "model_state_dict": {"norms.0.weight": planted}}, protocol=4))


def test_an_array_of_a_size_that_memory_cannot_hold_is_a_user_error(tmp_path, config):
    content = {"epoch": 1, "model_state_dict": Call(np.ndarray, (10**15,), "f8")}
    (tmp_path / "best.pdparams").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"best\.pdparams"):
        load_model(config, tmp_path / "best.pdparams")
