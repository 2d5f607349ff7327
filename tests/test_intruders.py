"""Nothing is let in: what strangers may have put into files runs no code, fills no memory, leaves no folder."""

import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import yaml

from deploy.common.cli import UserError, report_error, warn
from deploy.common.imaging import list_images, read_rgb
from deploy.common.plain_yaml import MOST_CHARACTERS, parse_yaml
from deploy.description import read_description
from tests.serving import png_that_claims
from utils.checkpoint import load_checkpoint, load_model
from utils.config import load_config
from utils.pickles import load_pickle
from utils.results import category_folder, describe_backbone
from utils.thresholds import load_thresholds
from utils.torch_files import MOST_BYTES
from utils.weights import read_weights


@pytest.fixture(autouse=True)
def at_once():
    """Whatever is refused is refused at once: none of these files may take time or memory."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 20


# ---- pickles; tests/test_checkpoint.py plants calls


def refused_pickle(tmp_path, data, words=""):
    path = tmp_path / "best.pdparams"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"best\.pdparams.*{words}"):
        load_pickle(path)


def proto(*instructions):
    return b"\x80\x04" + b"".join(instructions) + b"."


@pytest.mark.slow
def test_lists_that_hold_each_other_twice_do_not_fill_the_memory(tmp_path):
    value = []
    for _ in range(60):
        value = [value, value]
    refused_pickle(tmp_path, pickle.dumps(value, protocol=4), "more than 1000000 values")


def test_a_list_that_holds_itself_is_refused(tmp_path):
    value = []
    value.append(value)
    refused_pickle(tmp_path, pickle.dumps(value, protocol=4))


def test_settings_in_a_checkpoint_make_no_model_that_is_larger_than_its_file(tmp_path, config):
    """Here they ask for one of 150 GB."""
    huge = {**config.as_dict(), "backbone_name": "wide_resnet50_2", "channels": None, "scales": None}
    huge |= {"flow_step": 64, "hidden_ratio": 64.0}
    content = {"epoch": 1, "model_state_dict": {}, "config": huge, "held_out": []}
    (tmp_path / "best.pdparams").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UserError, match=r"best\.pdparams: flow_step 64 and hidden_ratio 64 make a larger model than"):
        load_model(config, tmp_path / "best.pdparams", [])


def test_a_text_in_many_places_does_not_fill_the_memory_of_who_prints_it(tmp_path):
    text = "s" * 1_000_000
    for value in ([text] * 900_000, [text.encode()] * 900_000, [{text: 1}] * 400_000):
        refused_pickle(tmp_path, pickle.dumps(value, protocol=4), "texts of more than 10000000 characters")


@pytest.mark.slow
def test_objects_that_take_more_memory_than_their_bytes_are_not_piled_up(tmp_path):
    refused_pickle(tmp_path, proto(b"}" * 30_000_000), "more than 3000000 instructions")


@pytest.mark.slow
def test_a_history_of_100000_epochs_is_read(tmp_path):
    row = {"epoch": 1, "loss": 0.5, "lr": 0.5, "image_auroc": 0.5, "pixel_auroc": 0.5, "selection": 0.5}
    history = [row | {"seconds": 0.5, "val_loss": 0.5} for _ in range(100_000)]
    (tmp_path / "last.pdparams").write_bytes(pickle.dumps({"history": history}, protocol=4))
    assert load_pickle(tmp_path / "last.pdparams")["history"] == history


def test_a_file_that_says_it_is_huge_is_not_read(tmp_path):
    path = tmp_path / "best.pdparams"
    path.touch()
    os.truncate(path, 200 * 2**30)
    with pytest.raises(UserError, match=r"best\.pdparams: has 214748364800 bytes"):
        load_pickle(path)


def test_keys_that_all_have_the_same_hash_are_refused(tmp_path):
    same = [k * (2**61 - 1) for k in range(1, 50_000)]
    assert {hash(key) for key in same} == {0}
    entries = b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"K\x01" for key in same)
    refused_pickle(tmp_path, proto(b"}(", entries, b"u"), "a key that is a large number")


def test_no_message_has_what_a_terminal_obeys(tmp_path):
    for call in (b"c\x1b[2J\nx\n", b"cnumpy\ndtype\n\x8c\x04\x1b[2J\x85R", b"c_codecs\nencode\n)\x8c\x04\x1b[2J\x86R"):
        (tmp_path / "best.pdparams").write_bytes(proto(call))
        with pytest.raises(UserError) as error:
            load_pickle(tmp_path / "best.pdparams")
        assert str(error.value).isprintable() and "x1b[2J" in str(error.value)


def test_a_tower_of_tuples_as_a_key_does_not_end_the_process(tmp_path):
    """Its hash would overflow the stack of C."""
    tower = b"}" + b")" + b"\x85" * 300_000 + b"K\x01s"
    refused_pickle(tmp_path, proto(tower), "a tuple where")
    refused_pickle(tmp_path, proto(b")" + b"\x85" * 300_000 + b"\x8c\x01x\x93"), "requires str")  # as a module


def test_no_message_shows_what_has_no_end(tmp_path):
    doubled = b"]q\x00" + b"](h\x00h\x00eq\x00" * 60  # each list holds the one before twice
    for call in (b"cnumpy\ndtype\nh\x00\x85R", b"c_codecs\nencode\n\x8c\x01xh\x00\x86R"):
        refused_pickle(tmp_path, proto(doubled, call), "a list where")


def test_a_place_in_the_memo_takes_no_memory(tmp_path):
    path = tmp_path / "one.pdparams"
    path.write_bytes(proto(b"K\x01", b"r" + struct.pack("<I", 2**32 - 1)))  # Python's reader would take 64 GB
    assert load_pickle(path) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x8e" + struct.pack("<Q", 2**40) + b"x",  # bytes that say they are a terabyte
        b"\x96" + struct.pack("<Q", 2**36) + b"x",
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
        b"(" * 100_000,
        b"0",
        b"u",
        b"t",
        b"R",
        b"\x93",
        b"(K\x01K\x02K\x03u",
        b"\x8f",  # a set
    ],
)
def test_instructions_that_make_no_sense_are_refused(tmp_path, data):
    refused_pickle(tmp_path, proto(data))


def test_the_same_bytes_are_not_decoded_again_and_again(tmp_path):
    encode = b"c_codecs\nencode\nq\x01X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x02\x8c\x06latin1q\x03"
    again = b"h\x01h\x02h\x03\x86R"
    refused_pickle(tmp_path, proto(encode, again * 100_000), "the same bytes")


def test_an_array_of_a_thousand_dimensions_is_refused(tmp_path):
    """Their product alone would take long."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R"
    number_type = b"cnumpy\ndtype\n\x8c\x02f4\x85R"
    large, a_list = b"\x8a\xff" + b"\x7f" * 255, b"]K\x01aJ\0\0\0\x7f"
    for sides, words in ((b"(" + large * 1000 + b"t", "do not agree"), (b"(" + a_list + b"t", "a list where")):
        refused_pickle(tmp_path, proto(array, b"(K\x01", sides, number_type, b"\x89B\x04\0\0\0abcdtb"), words)


def test_no_line_has_what_a_terminal_obeys(capsys):
    """Names of arrays and of files come from checkpoints too."""
    report_error(UserError("best.pdparams: \x1b[2J\n瓶 is not part of this model"))
    warn("\x9b2J")
    assert capsys.readouterr().err == (
        "error: best.pdparams: \\x1b[2J 瓶 is not part of this model\nwarning: \\x9b2J\n"
    )
    assert describe_backbone({"source": "\x1b[2J", "file": "\r", "sha256": "\a"}).isprintable()


# ---- archives


def npz(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_names_in_an_archive_lead_nowhere(tmp_path):
    (tmp_path / "in").mkdir()
    path = npz(tmp_path / "in/w.npz", **{"../../up.npy": npy(np.ones(2)), "/abs.npy": npy(np.ones(2))})
    assert sorted(read_weights(path)) == ["../../up", "/abs"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "w.npz"]


def test_an_archive_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path):
    path = npz(tmp_path / "w.npz", **{"a.npy": npy(np.ones(2))})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    path.write_bytes(data[: central + 24] + struct.pack("<I", MOST_BYTES) + data[central + 28 :])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.npy", npy(np.ones(2)))
    with pytest.raises(UserError, match=r"w\.npz.*when unpacked"):
        read_weights(path)


@pytest.mark.parametrize("shape", ["(1000000000000000,)", "(1000000000,)", "(-1,)", "(__import__('os'),)"])
def test_an_array_that_claims_too_much_is_refused(tmp_path, shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(8)
    with pytest.raises(UserError, match=r"w\.npz"):
        read_weights(npz(tmp_path / "w.npz", **{"a.npy": content}))


@pytest.mark.parametrize("claim", [2**63, 2**40, 100])
def test_a_safetensors_header_that_claims_too_much_is_refused(tmp_path, claim):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", claim) + b"{}")
    with pytest.raises(UserError, match=r"w\.safetensors"):
        read_weights(tmp_path / "w.safetensors")


# ---- YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [*{before}, *{before}]}}\n"
    for before, name in zip([f"a{'a' * i}" for i in range(40)], [f"a{'a' * i}" for i in range(1, 41)], strict=True)
)
YAML_BOMBS = {
    "billion laughs": (LAUGHS, "aliases"),
    "merged keys": (MERGES, "aliases"),
    "deep": ("[" * 600, "not valid YAML"),
    "large": ("a: 1\n" * (MOST_CHARACTERS // 5 + 1), "characters"),
    "long number": ("a: 0x" + "f" * 5000, "digits"),
    "sixties": ("a: 1" + ":1" * 5000, "digits"),
    "python": ("!!python/object/apply:os.system ['exit']", "not valid YAML"),
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_stays_small(tmp_path, config, name):
    text, words = YAML_BOMBS[name]
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml.*{words}"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=words):
        load_config("configs/resnet18.yaml", [f"lr={text}"])
    (tmp_path / "thresholds.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"thresholds\.yaml.*{words}"):
        load_thresholds(tmp_path / "best.pdparams", config)
    for file in ("inference.json", "inference.pdiparams"):
        (tmp_path / file).touch()
    (tmp_path / "inference.yml").write_text(text)
    with pytest.raises(UserError, match=rf"inference\.yml.*{words}"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"std": [0.5, 0, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [0.5, 0.5]},
        {"image_threshold": float("inf")},
        {"pixel_threshold": 10**400},
        {"input_size": [32, 10**9]},
        {"input_size": [32, float("inf")]},
        {"input_size": [32]},
        {"image_score": "mean"},
        {"image_score": ["top"]},
        {"image_score": "top", "top_share": 0},
        {"image_score": "top", "top_share": float("nan")},
        {"image_score": "top", "top_share": None},
    ],
)
def test_numbers_of_a_model_that_cannot_be_used_are_refused(tmp_path, change):
    checksum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
    description = {"category": "bottle", "input_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    description |= {"image_threshold": 0.5, "pixel_threshold": 0.5, "sha256": {}}
    for name in ("inference.json", "inference.pdiparams"):
        (tmp_path / name).touch()
        description["sha256"][name] = checksum
    (tmp_path / "inference.yml").write_text(yaml.safe_dump(description))
    read = read_description(tmp_path)
    assert read["std"] == [0.5, 0.5, 0.5]
    assert (read["image_score"], read["top_share"]) == ("max", None)  # of exports that do not say
    (tmp_path / "inference.yml").write_text(yaml.safe_dump(description | change))
    with pytest.raises(UserError, match=r"inference\.yml: damaged"):
        read_description(tmp_path)


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(UserError, match="/dev/zero"):
        load_config("/dev/zero")


# ---- pictures and what stands in their place


def test_60000x60000_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png_that_claims(60000, 60000))
    with pytest.raises(UserError, match=r"a\.png.*3600000000 pixels"):
        read_rgb(tmp_path / "a.png")


def test_nothing_waits_for_a_pipe(tmp_path, config):
    for name in ("a.png", "best.pdparams", "w.npz", "thresholds.yaml"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: read_rgb(tmp_path / "a.png"),
        lambda: load_checkpoint(tmp_path / "best.pdparams"),
        lambda: read_weights(tmp_path / "w.npz"),
        lambda: load_thresholds(tmp_path / "best.pdparams", config),
    ):
        with pytest.raises(UserError, match="no regular file"):
            read()
    with pytest.raises(UserError, match="no picture in this folder"):
        list_images(tmp_path)


def test_links_in_circles_are_no_pictures_and_no_endless_walk(tmp_path):
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    for name in "xyz":
        (tmp_path / name).symlink_to(".")
    with pytest.raises(UserError):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"a\.png"):
        read_rgb(tmp_path / "a.png")
    assert [path.name for path in list_images(tmp_path / "**/*.png")] == ["a.png", "b.png"]  # once; neither is read


# ---- names


@pytest.mark.parametrize(
    ("exp_dir", "category"),
    [
        ("../up", "bottle"),
        ("a/../../up", "bottle"),
        ("/tmp/up", "bottle"),
        ("", "bottle"),
        ("exp", ".."),
        ("exp", "../other"),
        ("exp", "/tmp/up"),
        ("exp", ""),
        ("exp", "a/b"),
    ],
)
def test_names_lead_out_of_no_folder(exp_dir, category):
    with pytest.raises(UserError, match=r"--exp_dir|category"):
        category_folder(exp_dir, category)
