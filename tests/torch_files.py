"""Writes small files as `torch.save` does, in both forms, without torch."""

import struct
import zipfile

import numpy as np

KINDS = {"<f8": "Double", "<f4": "Float", "<f2": "Half", "<u2": "BFloat16", "<i8": "Long", "<i4": "Int", "|b1": "Bool"}


def whole(value):
    """Instructions that put a number, text, tuple, list or dictionary on the stack; bytes are instructions already."""
    if isinstance(value, bytes):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + struct.pack("<B", len(data)) + data
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value)) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(whole, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(whole, value)) + b"e"
    return b"}(" + b"".join(whole(part) for item in value.items() for part in item) + b"u"


def pickled(value):
    return b"\x80\x02" + whole(value) + b"."


def call(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + whole(arguments) + b"R"


def storage(key, kind, count, *more):
    return whole(("storage", f"ctorch\n{kind}Storage\n".encode(), key, "cpu", count, *more)) + b"Q"


def tensor(stored, offset, sizes, strides):
    return call("torch._utils", "_rebuild_tensor_v2", stored, offset, sizes, strides, False, ordered({}))


def ordered(items):
    """An OrderedDict with torch's `_metadata`."""
    entries = b"".join(whole(part) for item in items.items() for part in item)
    return call("collections", "OrderedDict") + b"(" + entries + b"u" + whole({"_metadata": {"version": 1}}) + b"b"


def save(path, state, older=False, wrap=lambda content: content, name="archive"):
    """Arrays by name, each in a storage of its own; uint16 stands for bfloat16."""
    arrays = {key: np.asarray(value, order="C") for key, value in state.items()}
    more = (None,) if older else ()
    content, storages = {}, {}
    for number, (key, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        stored = storage(str(number), KINDS[array.dtype.str], array.size, *more)
        content[key] = tensor(stored, 0, array.shape, strides)
        storages[str(number)] = array
    write = write_pickles if older else write_archive
    return write(path, wrap(ordered(content)), storages, **({} if older else {"name": name}))


def write_archive(path, content, storages, name="archive", order=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{name}/data.pkl", pickled(content))
        if order:
            archive.writestr(f"{name}/byteorder", order)
        for key, array in storages.items():
            archive.writestr(f"{name}/data/{key}", array.tobytes())
        archive.writestr(f"{name}/version", b"3\n")
    return path


def write_pickles(path, content, storages, machine=None):
    machine = machine or {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}
    parts = [pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, machine, content, list(storages))]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    path.write_bytes(b"".join(parts))
    return path
