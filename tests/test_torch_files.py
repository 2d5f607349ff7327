"""torch's files are read without torch: both forms, every way to lay out a tensor, and nothing in them is run."""

import os
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from deploy.common.cli import UserError
from tests import torch_files
from tests.torch_files import call, ordered, storage, tensor, whole, write_archive, write_pickles
from utils.torch_files import LARGEST_LISTING, MOST_BYTES, load_torch

FORMS = pytest.mark.parametrize("write", [write_archive, write_pickles], ids=["archive", "pickles"])
NUMBERS = np.arange(12, dtype="<f4")


def read(write, tmp_path, content, **storages):
    return load_torch(write(tmp_path / "w.pth", content, storages or {"0": NUMBERS}))


def refused(tmp_path, words, path=None):
    """One line with the words that names the file, soon and with little memory."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(UserError, match=words) as error:
            load_torch(path or tmp_path / "w.pth")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 2
    assert str(error.value).startswith(f"{tmp_path}/w.pth: ")
    assert "\n" not in str(error.value)


# ---- what torch writes


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", ["<f8", "<f4", "<f2", "<i8", "<i4", "|b1"])
def test_arrays_of_each_type_come_back(tmp_path, older, kind):
    state = {"a.weight": np.arange(6).reshape(2, 3).astype(kind), "number": np.array(1, kind), "none": np.ones(0, kind)}
    loaded = load_torch(torch_files.save(tmp_path / "w.pth", state, older))
    assert list(loaded) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


@pytest.mark.parametrize("older", [False, True])
def test_bfloat16_comes_back_as_float32(tmp_path, older):
    numbers = np.float32([1.5, -2, 0, 1e30, np.inf])
    upper = (numbers.view("<u4") >> 16).astype("<u2")
    loaded = load_torch(torch_files.save(tmp_path / "w.pth", {"a": upper}, older))["a"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, (upper.astype("<u4") << 16).view("<f4"))
    np.testing.assert_allclose(loaded[:4], numbers[:4], rtol=2**-7)


@FORMS
def test_tensors_may_be_views_of_one_storage(tmp_path, write):
    stored = storage("0", "Float", 12)
    loaded = read(
        write,
        tmp_path,
        {
            "turned": tensor(stored, 0, (4, 3), (1, 4)),
            "part": tensor(stored, 5, (2, 2), (4, 1)),
            "last": tensor(stored, 11, (), ()),
            "repeated": tensor(stored, 2, (3, 2), (0, 1)),
            "one": tensor(stored, 11, (1, 1), (10**30, 10**30)),
            "parameter": call("torch._utils", "_rebuild_parameter", tensor(stored, 0, (2,), (1,)), True, ordered({})),
        },
    )
    table = NUMBERS.reshape(3, 4)
    np.testing.assert_array_equal(loaded["turned"], table.T)
    np.testing.assert_array_equal(loaded["part"], table[1:, 1:3])
    np.testing.assert_array_equal(loaded["last"], 11)
    np.testing.assert_array_equal(loaded["repeated"], [[2, 3]] * 3)
    np.testing.assert_array_equal(loaded["one"], [[11]])
    np.testing.assert_array_equal(loaded["parameter"], [0, 1])
    assert not any(value.flags.writeable for value in loaded.values())


def test_files_of_2017_are_read(tmp_path):
    """Python 2 wrote texts of bytes and an OrderedDict with a list; parameters were objects with attributes."""
    word = b"U\x07storage" + b"ctorch\nFloatStorage\n" + b"U\x010" + b"U\x03cpu" + whole(12) + b"N"
    old_tensor = call("torch._utils", "_rebuild_tensor", b"(" + word + b"tQ", 0, (3, 4), (4, 1))
    parameter = call("torch.nn.parameter", "Parameter", old_tensor) + whole((True, False, ordered({}))) + b"b"
    content = call("collections", "OrderedDict", b"](](U\x01a" + parameter + b"ee")
    np.testing.assert_array_equal(read(write_pickles, tmp_path, content)["a"], NUMBERS.reshape(3, 4))


def test_an_archive_may_have_any_name_no_byte_order_and_be_compressed(tmp_path):
    content = {"a": tensor(storage("0", "Float", 12), 0, (12,), (1,))}
    options = {"name": "resnet18-瓶", "order": None, "compression": zipfile.ZIP_DEFLATED}
    path = write_archive(tmp_path / "w.pth", content, {"0": NUMBERS}, **options)
    np.testing.assert_array_equal(load_torch(path)["a"], NUMBERS)


# ---- what is damaged, and what no weights file needs


@pytest.mark.parametrize("older", [False, True])
def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, older):
    data = torch_files.save(tmp_path / "w.pth", {"a": NUMBERS, "b": np.ones(3)}, older).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "w.pth").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"not a torch weights file, or damaged|no weights file needs that"):
            load_torch(tmp_path / "w.pth")


@FORMS
@pytest.mark.parametrize(
    ("offset", "sizes", "strides", "words"),
    [
        (0, (13,), (1,), "beyond its numbers"),
        (12, (), (), "beyond its numbers"),
        (0, (3, 4), (5, 1), "beyond its numbers"),
        (10**30, (1,), (1,), "beyond its numbers"),
        (-1, (2,), (1,), "impossible"),
        (0, (-1,), (1,), "impossible"),
        (11, (2,), (-1,), "impossible"),
        (0, ("1",), (1,), "a str where"),
        (0, (1,) * 40, (0,) * 40, "impossible"),
        (0, (1, 1), (1,), "damaged"),
        (0, (MOST_BYTES // 4 + 1,), (0,), "tensors of more than"),
        (0, (2**62, 2**62), (0, 0), "damaged|tensors of more"),
        (0, (10**30, 0), (1, 1), "damaged"),
    ],
)
def test_a_tensor_lies_within_its_storage(tmp_path, write, offset, sizes, strides, words):
    write(tmp_path / "w.pth", {"a": tensor(storage("0", "Float", 12), offset, sizes, strides)}, {"0": NUMBERS})
    refused(tmp_path, words)


@FORMS
def test_a_small_file_makes_no_more_arrays_than_memory_holds(tmp_path, write):
    """They would be views, which take no memory, until somebody computes with them."""
    large = tensor(storage("0", "Float", 12), 0, (MOST_BYTES // 8,), (0,))
    write(tmp_path / "w.pth", {"a": large}, {"0": NUMBERS})
    assert load_torch(tmp_path / "w.pth")["a"].shape == (MOST_BYTES // 8,)
    write(tmp_path / "w.pth", {"a": large, "b": large, "c": large}, {"0": NUMBERS})
    refused(tmp_path, "tensors of more than")


@FORMS
@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (whole(("storage", "<f4", "1", "cpu", 12)), "damaged"),  # a key that the file does not have
        (whole(("storage", "<f4", "0", "cpu", 13)), "not all numbers"),
        (whole(("storage", "<f4", "0", "cpu", 2**60)), "not all numbers"),
        (whole(("storage", "<f4", "0", "cpu", -12)), "damaged"),
        (whole(("storage", "<f8", "0", "cpu", 12)), "not all numbers"),
        (whole(("storage", "O", "0", "cpu", 12)), "something else in the place"),
        (whole(("storage", ["<f4"], "0", "cpu", 12)), "a list where"),
        (whole(("storage", "<f4", 0, "cpu", 12)), "a int where"),
        (whole(("storage", "<f4", "0", "cpu", 12, ("0", 0, 12))), "something else in the place"),
        (whole(("module", "<f4", "0", "cpu", 12)), "something else in the place"),
        (whole("0"), "a str where"),
    ],
)
def test_a_storage_is_what_the_file_holds(tmp_path, write, saved, words):
    write(tmp_path / "w.pth", {"a": tensor(saved + b"Q", 0, (12,), (1,))}, {"0": NUMBERS})
    refused(tmp_path, words)


@FORMS
def test_the_same_numbers_as_two_types_are_refused(tmp_path, write):
    tensors = {kind: tensor(storage("0", kind, 12), 0, (12,), (1,)) for kind in ("Float", "Int")}
    write(tmp_path / "w.pth", tensors, {"0": NUMBERS})
    refused(tmp_path, "two types")


@pytest.mark.parametrize(
    ("write", "options"), [(write_archive, {"order": b"big"}), (write_pickles, {"machine": {"little_endian": False}})]
)
def test_numbers_of_other_machines_are_refused(tmp_path, write, options):
    write(tmp_path / "w.pth", {"a": tensor(storage("0", "Float", 12), 0, (12,), (1,))}, {"0": NUMBERS}, **options)
    refused(tmp_path, "byte order")


@FORMS
@pytest.mark.parametrize(
    "planted",
    [
        lambda trap: call("os", "system", f"touch {trap}"),
        lambda trap: call("posix", "system", f"touch {trap}"),
        lambda trap: call("builtins", "eval", f"open({trap!r}, 'w')"),
        lambda trap: call("torch", "load", trap),
        lambda trap: call("torch.hub", "load", trap),
        lambda trap: call("torch.serialization", "_load", trap),
        lambda trap: call("torchvision.models.resnet", "ResNet"),
        lambda trap: b"cos\nsystem\n" + whole((f"touch {trap}",)) + b"\x81",  # NEWOBJ
        lambda trap: b"(" + whole(f"touch {trap}") + b"ios\nsystem\n",  # INST
        lambda trap: b"(cos\nsystem\n" + whole(f"touch {trap}") + b"o",  # OBJ
    ],
)
@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"a": x}, lambda x: ordered({"a": [(1, x)]}) + x + b"b"])
def test_nothing_in_a_file_is_run(tmp_path, write, planted, place):
    trap = tmp_path / "trap"
    write(tmp_path / "w.pth", place(planted(str(trap))), {"0": NUMBERS})
    refused(tmp_path, r"no weights file needs that, so it is not loaded; torch\.save\(model\.state_dict\(\), FILE\)")
    assert not trap.exists()


def test_the_other_pickles_of_the_older_form_run_nothing_either(tmp_path):
    trap = tmp_path / "trap"
    planted = torch_files.pickled(call("os", "system", f"touch {trap}"))
    parts = [torch_files.pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    for place in range(5):
        (tmp_path / "w.pth").write_bytes(b"".join([*parts[:place], planted, *parts[place + 1 :]]))
        refused(tmp_path, r"'os\.system'")
    assert not trap.exists()
    (tmp_path / "w.pth").write_bytes(b"".join(parts))
    assert load_torch(tmp_path / "w.pth") == {}


# ---- what would cost much


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path):
    path = write_archive(
        tmp_path / "w.pth",
        {"a": tensor(storage("0", "Float", 2**24), 0, (1,), (1,))},
        {"0": np.zeros(2**24, "<f4")},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 2**17
    data = path.read_bytes()
    entry = data.rindex(b"PK\x01\x02", 0, data.index(b"archive/data/0", data.index(b"PK\x01\x02")))
    sizes = {"says less": 48, "says more": MOST_BYTES}
    for size in sizes.values():
        path.write_bytes(data[: entry + 24] + struct.pack("<I", size) + data[entry + 28 :])
        refused(tmp_path, "when unpacked" if size == MOST_BYTES else "damaged")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entries_are_compressed_in_the_usual_way(tmp_path, compression):
    content = {"a": tensor(storage("0", "Float", 12), 0, (12,), (1,))}
    write_archive(tmp_path / "w.pth", content, {"0": NUMBERS}, compression=compression)
    refused(tmp_path, "compressed in another way")


def test_an_archive_of_very_many_entries_is_refused(tmp_path):
    entry = b"PK\x01\x02".ljust(46, b"\0")
    count = LARGEST_LISTING // len(entry) + 1
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry) * count, 4, 0)
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04" + entry * count + end)
    refused(tmp_path, "a list of entries")


def test_pairs_cost_what_instructions_cost(tmp_path):
    """The same list of pairs can be made a dictionary again and again."""
    pairs = whole([["a", 1]] * 10_000) + b"r\0\0\0\0"
    content = b"(" + pairs + b"ccollections\nOrderedDict\n(j\0\0\0\0tR" * 1000 + b"t"
    write_archive(tmp_path / "w.pth", content, {})
    begun = time.process_time()
    with pytest.raises(UserError, match="instructions"):
        load_torch(tmp_path / "w.pth")
    assert time.process_time() - begun < 2


def test_no_torch_file_at_all(tmp_path):
    for content in (b"", b"PK\x03\x04", b"text\n", b"\x80\x02K\x01.", os.urandom(99), b"PK\x05\x06".ljust(22, b"\0")):
        (tmp_path / "w.pth").write_bytes(content)
        refused(tmp_path, "not a torch weights file|no weights file needs that")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("a.npy", b"")
    refused(tmp_path, r"without data\.pkl")
