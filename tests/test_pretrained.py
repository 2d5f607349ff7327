"""Where the backbone's weights come from, and what happens when a source fails."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import paddle
import paddle.utils.download
import pytest
from paddle.vision.models import resnet
from PIL import Image
from safetensors.numpy import save_file

from deploy.common.cli import UserError
from models.backbone import BACKBONES, Backbone, build_backbone
from tests import torch_files
from utils.config import load_config
from utils.results import OFFLINE
from utils.weights import VARIABLE, download_official, load_backbone, official_file, read_weights

SUFFIXES = (".npz", ".pdparams", ".safetensors", ".pth")
EXTRA = {"fc.weight": np.ones((512, 10), np.float32), "layer4.0.conv1.weight": np.ones((2, 2), np.float32)}


@functools.cache
def weights(seed):
    """A whole state of the backbone; every seed gives another."""
    random = np.random.default_rng(seed)
    state = build_backbone("resnet18").state_dict()
    return {name: random.random(value.shape, np.float32) + 0.5 for name, value in state.items()}


def write(path, state):
    """In the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix in (".pth", ".pt"):
        torch_files.save(path, torchs_names(state), older=path.suffix == ".pt")
    else:
        paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(path))
    return path


def torchs_names(state):
    """The state as torch would have it, with the counter that each BatchNorm has there."""
    named = {}
    for name, value in state.items():
        named[name.replace("._mean", ".running_mean").replace("._variance", ".running_var")] = value
        if name.endswith("._mean"):
            named[name.replace("._mean", ".num_batches_tracked")] = np.array(7)
    return named


def publish(monkeypatch, url, md5):
    """Let this be the official file of resnet18."""
    monkeypatch.setitem(BACKBONES, "resnet18", dataclasses.replace(BACKBONES["resnet18"], weights=(url, md5)))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def small_config():
    return load_config("configs/resnet18.yaml", ["input_size=32"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures that an offline start can be calibrated on."""
    folder = tmp_path_factory.mktemp("train")
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty weight cache, and a download address where nobody listens."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(paddle.utils.download, "WEIGHTS_HOME", str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    publish(monkeypatch, f"http://127.0.0.1:{port}/resnet18.pdparams", "0" * 32)
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder / "resnet18.pdparams"


@pytest.fixture
def load(cache, small_config, pictures):
    """`load(file)` is the backbone and its provenance."""

    def call(file=None, config=small_config):
        backbone = build_backbone("resnet18")
        provenance = load_backbone(backbone, config, str(file) if file else None, pictures)
        return backbone, provenance

    return call


def assert_holds(backbone, state):
    for name, value in backbone.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name], err_msg=name)


def assert_offline(backbone, provenance, capsys):
    assert provenance == {"source": OFFLINE, "file": None, "sha256": None}
    error = capsys.readouterr().err
    assert "NO IMAGENET WEIGHTS" in error
    assert "--backbone_weights" in error
    assert VARIABLE in error
    assert np.isfinite(backbone(paddle.rand([1, 3, 32, 32]))[2].numpy()).all()
    return error


# ---- the order of the sources


def test_the_order_of_the_sources(tmp_path, monkeypatch, load, cache):
    """Each source in turn is taken away; each holds other weights."""
    option, variable = write(tmp_path / "option.npz", weights(1)), write(tmp_path / "variable.npz", weights(2))
    own = write(tmp_path / "own.npz", weights(4))
    monkeypatch.setenv(VARIABLE, str(variable))
    monkeypatch.setenv("FASTFLOW_WEIGHTS_RESNET18", str(own))
    monkeypatch.setenv("FASTFLOW_WEIGHTS_RESNET34", str(tmp_path / "of another backbone"))
    write(cache, weights(3))

    backbone, provenance = load(option)
    assert provenance == {"source": "--backbone_weights", "file": str(option), "sha256": sha256(option)}
    assert_holds(backbone, weights(1))

    backbone, provenance = load()
    assert provenance == {"source": "FASTFLOW_WEIGHTS_RESNET18", "file": str(own), "sha256": sha256(own)}
    assert_holds(backbone, weights(4))

    monkeypatch.setenv("FASTFLOW_WEIGHTS_RESNET18", "")
    backbone, provenance = load()
    assert provenance == {"source": VARIABLE, "file": str(variable), "sha256": sha256(variable)}
    assert_holds(backbone, weights(2))

    monkeypatch.setenv(VARIABLE, "")
    backbone, provenance = load()
    assert (provenance["file"], provenance["sha256"]) == (str(cache), sha256(cache))
    assert_holds(backbone, weights(3))

    cache.unlink()
    _, provenance = load()
    assert provenance["source"] == OFFLINE


def test_pretrained_offline_looks_at_the_option_only(tmp_path, monkeypatch, load, cache, capsys):
    config = load_config("configs/resnet18.yaml", ["input_size=32", "pretrained=offline"])
    write(cache, weights(3))
    for variable in (VARIABLE, "FASTFLOW_WEIGHTS_RESNET18"):
        monkeypatch.setenv(variable, str(write(tmp_path / "variable.npz", weights(2))))
    assert_offline(*load(config=config), capsys)
    backbone, _ = load(write(tmp_path / "w.npz", weights(1)), config=config)
    assert_holds(backbone, weights(1))


def test_a_variable_that_names_weights_of_another_backbone_is_named(tmp_path, monkeypatch, cache, pictures):
    """Set for one backbone, it stays set when another one is tried."""
    monkeypatch.setenv(VARIABLE, str(write(tmp_path / "w.npz", weights(1))))
    config = load_config("configs/resnet34.yaml", ["input_size=32"])
    with pytest.raises(UserError) as error:
        load_backbone(build_backbone("resnet34"), config, None, pictures)
    advice = (
        f"; {VARIABLE} names this file: name one of resnet34 in FASTFLOW_WEIGHTS_RESNET34 or with --backbone_weights"
    )
    assert str(error.value).startswith(f"{tmp_path}/w.npz: does not fit this model: ")
    assert str(error.value).endswith(advice)


# ---- named files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read_and_what_the_backbone_does_not_need_ignored(tmp_path, load, suffix):
    backbone, provenance = load(write(tmp_path / f"w{suffix}", weights(1) | EXTRA))
    assert_holds(backbone, weights(1))
    assert provenance["sha256"] == sha256(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_paddles_own_resnet18_file_loads(tmp_path, load, protocol):
    """Paddle adds a table of names to the file; the official one of 2020 is of protocol 2."""
    paddle.seed(5)
    whole = resnet.resnet18(pretrained=False).state_dict()
    paddle.save(whole, str(tmp_path / "resnet18.pdparams"), protocol=protocol)
    backbone, _ = load(tmp_path / "resnet18.pdparams")
    assert_holds(backbone, {name: value.numpy() for name, value in whole.items()})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_named_file_that_is_damaged_is_a_user_error(tmp_path, load, suffix):
    path = write(tmp_path / f"w{suffix}", weights(1))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"w\{suffix}"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"w\{suffix}"):
        load(path)


@pytest.mark.parametrize("name", ["absent.npz", "absent.pdparams", "absent.safetensors", "w.txt", "w", "folder.npz"])
def test_a_named_file_that_is_no_weights_file_is_a_user_error(tmp_path, monkeypatch, load, name):
    (tmp_path / "w.txt").write_text("weights")
    (tmp_path / "w").write_text("weights")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=name):
        load(tmp_path / name)
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    with pytest.raises(UserError, match=name):
        load()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"conv1.weight": None}, id="missing"),
        pytest.param({"conv1.weight": np.ones((64, 3, 3, 3), np.float32)}, id="misshapen"),
        pytest.param({"layer1.2.conv1.weight": np.ones(3, np.float32)}, id="unknown"),
    ],
)
def test_another_architecture_is_a_user_error_that_names_the_key(tmp_path, load, suffix, change):
    state = {name: value for name, value in (weights(1) | change).items() if value is not None}
    with pytest.raises(UserError, match=rf"w\{suffix}.*{next(iter(change))}"):
        load(write(tmp_path / f"w{suffix}", state))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e39])
def test_a_number_that_is_not_finite_is_a_user_error_that_names_the_key(tmp_path, load, suffix, number):
    """A ReLU would hide it, and training would go to its end."""
    value = weights(1)["layer2.0.conv1.weight"].astype(np.float64)  # 1e39 is no float32
    value[3, 2, 1, 0] = number
    line = rf"w\{suffix}: layer2\.0\.conv1\.weight holds numbers that are not finite"
    with pytest.raises(UserError, match=line):
        load(write(tmp_path / f"w{suffix}", weights(1) | {"layer2.0.conv1.weight": value}))


def test_what_is_not_used_of_a_file_may_be_anything(tmp_path, load):
    load(write(tmp_path / "w.npz", weights(1) | {"fc.weight": np.full((512, 10), np.nan)}))


def test_arrays_that_are_no_numbers_are_a_user_error(tmp_path, load):
    path = write(tmp_path / "w.npz", weights(1) | {"bn1.bias": np.full(64, "x")})
    with pytest.raises(UserError, match=r"w\.npz"):
        load(path)


@pytest.mark.parametrize("content", [[1, 2], None, "text", {1: 2}, np.ones(3)])
def test_a_pickle_of_something_else_is_a_user_error(tmp_path, load, content):
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"w\.pdparams"):
        load(tmp_path / "w.pdparams")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_objects_in_a_file_are_not_run(tmp_path):
    np.savez(tmp_path / "w.npz", **{"conv1.weight": np.array([Trap(tmp_path / "trap")], dtype=object)})
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps({"conv1.weight": Trap(tmp_path / "trap")}))
    np.save(tmp_path / "array.npy", np.array([Trap(tmp_path / "trap")], dtype=object), allow_pickle=True)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("w.npz", "w.pdparams", "array.npz"):
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "trap").exists()


# ---- what torch writes


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".pt", ".bin"])
def test_torchs_names_are_understood_whatever_the_format(tmp_path, load, suffix):
    state = torchs_names(weights(1) | EXTRA)
    assert "bn1.running_var" in state
    path = tmp_path / f"w{suffix}"
    torch_files.save(path, state) if suffix == ".bin" else write(path, state)
    backbone, provenance = load(path)
    assert_holds(backbone, weights(1))
    assert provenance["sha256"] == sha256(path)


@pytest.mark.parametrize(
    ("older", "prefix", "wrapper"),
    [(False, "module.", "state_dict"), (True, "model.", "model"), (False, "module.model.", None)],
)
def test_what_training_scripts_put_around_the_weights_is_taken_off(tmp_path, load, older, prefix, wrapper):
    def wrap(content):
        return {"epoch": 90, "arch": "resnet18", "best": None, wrapper: content} if wrapper else content

    state = {prefix + name: value for name, value in torchs_names(weights(1) | EXTRA).items()}
    backbone, _ = load(torch_files.save(tmp_path / "w.pth", state, older, wrap))
    assert_holds(backbone, weights(1))


def test_a_layer_that_is_called_model_keeps_its_name(monkeypatch, tmp_path, small_config, pictures):
    class Inner(paddle.nn.Layer):
        def __init__(self, scales):
            super().__init__()
            self.model = paddle.nn.Conv2D(3, 4, 1)

    monkeypatch.setitem(BACKBONES, "inner", Backbone(Inner, levels=(1,)))
    config = dataclasses.replace(small_config, backbone_name="inner")
    layer = build_backbone("inner")
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in layer.state_dict().items()})
    load_backbone(layer, config, str(tmp_path / "w.npz"), pictures)


def test_half_the_bits_are_enough(tmp_path, load):
    """float16, or bfloat16: the upper half of a float32."""
    whole, name = weights(1), "layer1.0.conv1.weight"
    half, upper = whole[name].astype("<f2"), (whole[name].view("<u4") >> 16).astype("<u2")
    for stored, value in ((half, half.astype("<f4")), (upper, (upper.astype("<u4") << 16).view("<f4"))):
        backbone, _ = load(torch_files.save(tmp_path / "w.pth", torchs_names(whole | {name: stored})))
        assert_holds(backbone, whole | {name: value})


def safetensors(path, state, kind):
    """With numbers of a type that numpy lacks, beside int64."""
    header, start = {}, 0
    for name, value in state.items():
        header[name] = {
            "dtype": "I64" if value.dtype == "i8" else kind,
            "shape": list(value.shape),
            "data_offsets": [start, start + value.nbytes],
        }
        start += value.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in state.values()))
    return path


def test_safetensors_of_bfloat16_are_read(tmp_path, load):
    upper = {name: (value.view("<u4") >> 16).astype("<u2") for name, value in weights(1).items()}
    backbone, _ = load(safetensors(tmp_path / "w.safetensors", torchs_names(upper), "BF16"))
    assert_holds(backbone, {name: (value.astype("<u4") << 16).view("<f4") for name, value in upper.items()})


def test_safetensors_of_eight_bits_are_one_line(tmp_path):
    path = safetensors(tmp_path / "w.safetensors", {"a": np.ones(2, "u1")}, "F8_E4M3")
    with pytest.raises(UserError, match=r"w\.safetensors: holds numbers of the type F8_E4M3"):
        read_weights(path)


# ---- cache and download


@pytest.fixture
def serve(cache, monkeypatch, tmp_path):
    """`serve(md5)` puts weights(4) on a local server under Paddle's address; returns the list of requests."""
    content = write(tmp_path / "served.pdparams", weights(4)).read_bytes()
    servers = []

    def start(md5=None):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_address[1]}/models/resnet18.pdparams"
        publish(monkeypatch, url, md5 or hashlib.md5(content).hexdigest())
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_official_file_is_downloaded_once_and_kept_in_paddles_cache(load, serve, cache, capsys):
    requests = serve()
    backbone, provenance = load()
    assert (provenance["file"], provenance["sha256"]) == (str(cache), sha256(cache))
    assert "download" in provenance["source"]
    assert "NO IMAGENET WEIGHTS" not in capsys.readouterr().err
    assert_holds(backbone, weights(4))
    assert os.listdir(cache.parent) == [cache.name]
    backbone, provenance = load()
    assert "download" not in provenance["source"]
    assert_holds(backbone, weights(4))
    assert requests == ["/models/resnet18.pdparams"]


def test_a_wrong_checksum_keeps_nothing_and_starts_offline(load, serve, cache, capsys):
    requests = serve(md5="f" * 32)
    assert "checksum" in assert_offline(*load(), capsys)
    assert not cache.exists()
    assert len(requests) == 1  # one attempt


def test_a_refused_connection_starts_offline_with_a_warning(load, cache, capsys):
    assert "cannot be had" in assert_offline(*load(), capsys)
    assert not cache.exists()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"garbage\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", id="404"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", id="cut off"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\nx", id="odd length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nx", id="cut off in a chunk"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: nowhere://x\r\n\r\n", id="odd redirect"),
    ],
)
def test_whatever_a_server_answers_is_a_user_error(cache, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/resnet18.pdparams"
        with pytest.raises(UserError, match="backbone weights"):
            download_official(url, "0" * 32, cache)
        thread.join(5)
    assert not cache.exists()


def test_a_download_that_cannot_be_kept_leaves_no_part_of_a_file(load, serve, cache, tmp_path, monkeypatch, capsys):
    serve()
    (tmp_path / "file").touch()
    monkeypatch.setattr(paddle.utils.download, "WEIGHTS_HOME", str(tmp_path / "file"))
    load()  # with the downloaded weights or offline, but it goes on
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("damage", [lambda b: b[:1000], lambda b: b"", lambda b: b"<html>"])
def test_a_damaged_file_in_the_cache_does_not_stop_the_training(load, cache, capsys, damage):
    write(cache, weights(3))
    cache.write_bytes(damage(cache.read_bytes()))
    assert cache.name in assert_offline(*load(), capsys)  # says which file is damaged


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_the_official_file_is_the_one_that_paddle_knows_and_keeps(monkeypatch, tmp_path, name):
    monkeypatch.setattr(paddle.utils.download, "WEIGHTS_HOME", str(tmp_path))
    assert BACKBONES[name].weights == resnet.model_urls[name]
    assert official_file(BACKBONES[name].weights[0]) == tmp_path / f"{name}.pdparams"


def test_a_backbone_without_official_weights_starts_offline_at_once(monkeypatch, load, serve, tmp_path, capsys):
    requests = serve()
    monkeypatch.setitem(BACKBONES, "resnet18", dataclasses.replace(BACKBONES["resnet18"], weights=None))
    assert_offline(*load(), capsys)
    assert not requests
    backbone, _ = load(write(tmp_path / "w.npz", weights(1)))
    assert_holds(backbone, weights(1))


# ---- the offline start


def test_the_offline_start_is_the_same_every_time(load, capsys):
    paddle.seed(1)
    first, _ = load()
    paddle.seed(2)
    again, _ = load()
    assert_holds(again, {name: value.numpy() for name, value in first.state_dict().items()})


def test_the_offline_start_does_with_one_picture(small_config, cache, pictures, capsys):
    backbone = build_backbone("resnet18")
    assert load_backbone(backbone, small_config, None, pictures[:1])["source"] == OFFLINE
    assert np.isfinite(backbone(paddle.rand([1, 3, 32, 32]))[2].numpy()).all()
