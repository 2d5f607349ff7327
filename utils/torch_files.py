"""Read the files that `torch.save` writes, without torch, and run nothing that strangers may have put into them.

In both of their forms the content is a pickle, in which a tensor is a view of a storage: its offset, sizes and strides.

* Since PyTorch 1.6 the file is a zip archive with the pickle in `NAME/data.pkl` and a storage each in `NAME/data/KEY`.
* Before, five pickles follow each other (a magic number, a version, the machine, the content, the keys of the storages)
  and then the storages, each behind the count of its numbers in eight bytes.

Source: torch/serialization.py and torch/_utils.py of PyTorch.
"""

import functools
import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.pickles import INSTRUCTIONS, MOST_DIMENSIONS, NAMES, Array, Dict, Reader, Refused, of_kind, opened

ZIP = b"PK\x03\x04"
MAGIC_NUMBER, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older form
MOST_BYTES = 2**31  # of weights when unpacked; CaiT M48 has 1.4 GB
LARGEST_LISTING = 2**23  # bytes of the list of an archive's entries; Python makes ten times as much of it
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others zipfile may unpack more than it is asked for
BFLOAT16 = "bfloat16"  # the upper half of a float32; numpy has no such type
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
ADVICE = "; torch.save(model.state_dict(), FILE) writes one that is"
INCOMPLETE = "not all numbers of its tensors are there"


def load_torch(path: Path) -> Any:
    """Arrays, containers, numbers and strings of a file of `torch.save`; tensors come back as arrays, read-only.

    Raises:
        UserError: missing, damaged, too large, or holding anything else (such files can run code when unpickled).
    """
    with opened(path, "torch", ADVICE) as (file, size):
        zipped = file.read(len(ZIP)) == ZIP
        file.seek(0)
        return _read_archive(file) if zipped else _read_pickles(file, size)


def check_archive(file: BinaryIO) -> None:
    """Refuse a zip archive that takes more memory than weights do. Leaves the file at its start.

    Raises:
        Refused: it does.
        zipfile.BadZipFile: not an archive, or damaged.
    """
    end = zipfile._EndRecData(file)  # as ZipFile finds it, which goes on to make an object for each entry
    if end and end[zipfile._ECD_SIZE] > LARGEST_LISTING:
        raise Refused(f"a list of entries of more than {LARGEST_LISTING} bytes")
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
            raise Refused(f"more than {MOST_BYTES} bytes when unpacked")
        if any(entry.compress_type not in COMPRESSIONS for entry in archive.infolist()):
            raise Refused("entries that are compressed in another way than zip's usual one")
    file.seek(0)


def numbers_of(data: bytes, kind: str) -> np.ndarray:
    """Bytes in little-endian order as an array of one dimension, read-only.

    Args:
        data: whole numbers of them.
        kind: a number type of numpy, or `BFLOAT16`, whose numbers come back as float32.
    """
    if kind != BFLOAT16:
        return np.frombuffer(data, kind)
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


class _Storage:
    """Numbers of one type, which tensors are views of; `fill` follows when the pickle is read."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.size = count * (2 if kind == BFLOAT16 else np.dtype(kind).itemsize)  # in the file, in bytes
        self._data: bytes | None = None

    def fill(self, data: bytes) -> None:
        if len(data) != self.size:
            raise ValueError(INCOMPLETE)
        self._data = data

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        if self._data is None:
            raise ValueError(INCOMPLETE)
        return numbers_of(self._data, self.kind)


class _Tensor(Array):
    """Stands in for a tensor: torch._utils._rebuild_tensor_v2(storage, offset, sizes, strides, ...)."""

    def __init__(self, storage: _Storage, offset: int, sizes: tuple, strides: tuple, *_: Any) -> None:
        if len(sizes) > MOST_DIMENSIONS or any(of_kind(int, number) < 0 for number in (offset, *sizes, *strides)):
            raise Refused("a tensor of impossible sizes or strides")
        self._storage, self._offset, self._sizes = of_kind(_Storage, storage), offset, sizes
        self._strides = [stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]

    def build(self, _: Any) -> None:
        """Attributes of a parameter are dropped."""

    @property
    def value(self) -> np.ndarray:
        """A view of the storage, which takes no memory of its own."""
        numbers = self._storage.numbers
        last = sum((size - 1) * stride for size, stride in zip(self._sizes, self._strides, strict=True))
        if 0 not in self._sizes and self._offset + last >= len(numbers):
            raise Refused("a tensor that reaches beyond its numbers")
        strides = [stride * numbers.itemsize for stride in self._strides]
        return np.lib.stride_tricks.as_strided(numbers[self._offset :], self._sizes, strides, writeable=False)


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    """torch._utils._rebuild_parameter, and what stands in its place in files of 2017"""
    return of_kind(_Tensor, tensor)


class _TorchReader(Reader):
    """Reads a pickle whose tensors are views of storages; `storages` has those that it names, by key."""

    # Files that Python 2 wrote have the last two.
    instructions = (*INSTRUCTIONS, "BINPERSID", "SHORT_BINSTRING", "BINSTRING")

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, size)
        self.storages: dict[str, _Storage] = {}
        self._bytes = MOST_BYTES
        self.names = {
            **NAMES,
            **{("torch", name): kind for name, kind in STORAGES.items()},
            ("collections", "OrderedDict"): self._ordered,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
            ("torch.nn.parameter", "Parameter"): _parameter,
        }

    def persistent_load(self, saved: Any) -> _Storage:
        """The storage of which ("storage", type, key, device, count) is written, in older files with a None behind."""
        word, kind, key, _, count, *view = of_kind(tuple, saved)
        if word != "storage" or of_kind(str, kind) not in STORAGES.values() or view not in ([], [None]):
            raise Refused("something else in the place of a tensor's numbers")
        storage = self.storages.setdefault(of_kind(str, key), _Storage(kind, of_kind(int, count)))
        if (storage.kind, storage.count) != (kind, count):
            raise Refused("the same numbers as two types")
        return storage

    def plain(self, value: Any) -> Any:
        """What was read without stand-ins; a few numbers can be many tensors, or a large one."""
        plain = super().plain(value)
        if isinstance(value, _Tensor):
            self._bytes -= plain.nbytes
            if self._bytes < 0:
                raise Refused(f"tensors of more than {MOST_BYTES} bytes")
        return plain

    def _ordered(self, pairs: list = ()) -> Dict:
        """collections.OrderedDict, of Python 2 with what is in it; each pair counts like an instruction."""
        self.dispatch.left -= len(pairs)
        ordered = Dict()
        for name, value in pairs:
            ordered[name] = value
        return ordered


def _read_archive(file: BinaryIO) -> Any:
    """The content of a file of the newer form."""
    check_archive(file)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("an archive without data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and _unpack(archive, order) != b"little":
            raise Refused("numbers in the byte order of machines that Paddle does not run on")
        content = _unpack(archive, pickles[0])
        reader = _TorchReader(io.BytesIO(content), len(content))
        value = reader.load()
        for key, storage in reader.storages.items():
            storage.fill(_unpack(archive, f"{folder}data/{key}"))
    return reader.plain(value)


def _unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry's content; no more than the size that `check_archive` has counted, whatever it would unpack to."""
    with archive.open(name) as entry:
        return entry.read(archive.getinfo(name).file_size)


def _read_pickles(file: BinaryIO, size: int) -> Any:
    """The content of a file of the older form."""
    magic_number, version, machine = (_TorchReader(file, size).load() for _ in range(3))
    if (magic_number, version) != (MAGIC_NUMBER, VERSION):
        raise ValueError("it does not begin as such a file does")
    if not of_kind(dict, machine).get("little_endian"):
        raise Refused("numbers in the byte order of machines that Paddle does not run on")
    reader = _TorchReader(file, size)
    value = reader.load()
    for key in of_kind(list, _TorchReader(file, size).load()):
        storage = reader.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count or storage.size > size - file.tell():
            raise ValueError(INCOMPLETE)
        storage.fill(file.read(storage.size))
    return reader.plain(value)
