"""Read the pickles that `paddle.save` writes, and run nothing that strangers may have put into them.

A pickle is a program for a small stack machine. Here it runs on Python's own machine, of which only `INSTRUCTIONS` are
left, those that build containers, texts and numbers, and in the place of functions only the stand-ins in `NAMES`.
Arrays are made of a plain number type, a shape and bytes.

`pickle.Unpickler`, the same machine in C, with a list of allowed names runs no code either and is shorter, but there
is no say in what an instruction may cost. Measured with Python 3.11 on 2026-11-27, of files that this reader refuses or
reads at once, it
- took 8 GB for a checkpoint of pickle protocol 2 with one flipped bit, or for 10 bytes: of the 2**32 places of its memo
  it makes all up to the one that is named;
- took 2 GB for 30 MB of empty dictionaries;
- had not read 200,000 keys of one hash (3 MB) after a minute;
- was killed by a signal at a key of 300,000 tuples in each other (300 KB).
A checkpoint of 43 MB takes 0.13 s here, 0.09 s there.
"""

import contextlib
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deploy.common.cli import UserError
from deploy.common.files import regular_file

NUMBER_TYPE = re.compile(r"[biuf]\d")  # bool, integers, floats; never objects, whose bytes would be pointers
PADDLES_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own key in a saved state_dict
LARGEST_FILE = 2**32  # bytes; the largest shipped configuration writes 0.5 GB
MOST_INSTRUCTIONS = 3_000_000  # a history of 100,000 epochs takes 2,000,000; a byte can ask for an object of 64
MOST_VALUES = 1_000_000  # of containers, numbers and texts, counted in each place that they are in; that history again
MOST_CHARACTERS = 10 * MOST_VALUES  # of texts, keys included, counted likewise
LARGEST_KEY = 2**31  # beyond it numbers can be chosen that all have the same hash, so that each finds its place late
MOST_DIMENSIONS = 32
INSTRUCTIONS = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()


class Refused(Exception):
    """What no weights file holds."""


class Dict(dict):
    """A dictionary of the file, with keys that cost little."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int) and abs(key) >= LARGEST_KEY:
            raise Refused("a key that is a large number")
        super().__setitem__(of_kind(str | int, key), value)

    def build(self, _: Any) -> None:
        """Attributes of an OrderedDict, such as torch's `_metadata`, are dropped."""


class NumberType:
    """Stands in for numpy.dtype(name, False, True)."""

    def __init__(self, name: str, *_: Any) -> None:
        if not NUMBER_TYPE.fullmatch(of_kind(str, name)):
            raise Refused(f"an array of {name!r:.99}, not of numbers")
        self.dtype = np.dtype(name)

    def build(self, state: tuple) -> None:
        if state[1] == ">":
            raise Refused("numbers in the byte order of machines that Paddle does not run on")


class Array:
    """Stands in for an array: numpy.core.multiarray._reconstruct(ndarray, (0,), b"b") and its state."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, number_type, fortran, data = state
        self.value = _make_array(number_type, shape, data, "F" if fortran else "C")


def _scalar(number_type: NumberType, data: bytes) -> Any:
    """numpy.core.multiarray.scalar"""
    return _make_array(number_type, (), data, "C")[()]


def _make_array(number_type: NumberType, shape: tuple[int, ...], data: bytes, order: str) -> np.ndarray:
    """A view of the data, which takes no memory of its own."""
    if not isinstance(number_type, NumberType) or not isinstance(data, bytes):
        raise Refused("an array that is not made of plain bytes")
    sides = [of_kind(int, side) for side in shape[:MOST_DIMENSIONS]]
    if len(sides) < len(shape) or math.prod(sides) * number_type.dtype.itemsize != len(data):
        raise Refused("an array whose shape and bytes do not agree")
    return np.frombuffer(data, number_type.dtype).reshape(sides, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """_codecs.encode, which older pickle protocols need for bytes."""
    if of_kind(str, encoding) != "latin1":
        raise Refused(f"text in the encoding {encoding!r:.99}")
    return text.encode("latin1")


NAMES: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("builtins", "tuple"): lambda values: of_kind(tuple, values),  # no copy
    ("__builtin__", "tuple"): lambda values: of_kind(tuple, values),
    ("collections", "OrderedDict"): lambda: Dict(),
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): None,  # is only named, never called
    ("numpy", "dtype"): NumberType,
}
for module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 name it differently
    NAMES[f"{module}.multiarray", "_reconstruct"] = Array
    NAMES[f"{module}.multiarray", "scalar"] = _scalar


class _Dispatch(dict):
    """What the machine does at each instruction, which it counts."""

    left = MOST_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise Refused(f"more than {MOST_INSTRUCTIONS} instructions")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> None:
        raise Refused(f"the instruction {code:#x}")


class Reader(pickle._Unpickler):
    """Python's machine with less in it. Reads the file up to the end of a pickle, `size` bytes at most."""

    instructions, names = INSTRUCTIONS, NAMES

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)
        codes = [getattr(pickle, name)[0] for name in self.instructions]
        self.dispatch = _Dispatch({code: getattr(type(self), self.dispatch[code].__name__) for code in codes})
        self._undecoded = size  # bytes that `_latin1` may still make
        self._values, self._characters = MOST_VALUES, MOST_CHARACTERS

    def find_class(self, module: str, name: str) -> Callable[..., Any] | None:
        if (module, name) not in self.names:
            raise Refused(repr(f"{module:.99}.{name:.99}"))  # a terminal would obey what may be in it
        return self.names[module, name]

    def load_empty_dictionary(self) -> None:
        self.append(Dict())

    def load_reduce(self) -> None:
        super().load_reduce()  # nothing that can be called gets here but what is in `names`
        self._undecoded -= len(self.stack[-1]) if isinstance(self.stack[-1], bytes) else 0
        if self._undecoded < 0:
            raise Refused("the same bytes many times")

    def load_build(self) -> None:
        state = self.stack.pop()
        of_kind(NumberType | Array | Dict, self.stack[-1]).build(state)

    def plain(self, value: Any) -> Any:
        """What was read without stand-ins; few values can be in the file, each in many places.

        `paddle.save` stores a tensor as (name, array), of which the array is kept.
        """
        self._values -= 1
        if self._values < 0:
            raise Refused(f"more than {MOST_VALUES} values")
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Array):
            value = value[1]
        if isinstance(value, Array):
            return value.value
        if isinstance(value, dict):
            return {self._counted(key): self.plain(item) for key, item in value.items() if key != PADDLES_NAME_TABLE}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(item) for item in value)
        return self._counted(of_kind(str | bytes | int | float | np.generic | None, value))

    def _counted(self, value: Any) -> Any:
        """The value, unless it is one text too many."""
        self._characters -= len(value) if isinstance(value, str | bytes) else 0
        if self._characters < 0:
            raise Refused(f"texts of more than {MOST_CHARACTERS} characters")
        return value


def load_pickle(path: Path) -> Any:
    """Arrays, containers, numbers and strings of a `.pdparams` file; tensors come back as arrays.

    Raises:
        UserError: missing, damaged, too large, or holding anything else (such files can run code when unpickled).
    """
    with opened(path, "Paddle") as (file, size):
        reader = Reader(file, size)
        return reader.plain(reader.load())


@contextlib.contextmanager
def opened(path: Path, writer: str, advice: str = "") -> Iterator[tuple[BinaryIO, int]]:
    """The open weights file and its size in bytes; whatever goes wrong within is one line that names the file.

    Args:
        path: the file.
        writer: who writes such files.
        advice: what that line ends with where the file holds what no weights file needs.

    Raises:
        UserError: that line.
    """
    try:
        size = regular_file(path).stat().st_size
        if size > LARGEST_FILE:
            raise UserError(f"{path}: has {size} bytes; a weights file has {LARGEST_FILE} at most, so it is not loaded")
        with path.open("rb") as file:
            yield file, size
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", "it does not fit into the memory")
        raise UserError(f"{path}: cannot be read ({reason})") from error
    except Refused as error:
        raise UserError(f"{path}: holds {error}; no weights file needs that, so it is not loaded{advice}") from error
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error) or "it ends too early"
        raise UserError(f"{path}: not a {writer} weights file, or damaged ({reason})") from error


def of_kind(kind: Any, value: Any) -> Any:
    """The value, if it is of this kind."""
    if not isinstance(value, kind):
        raise Refused(f"a {type(value).__name__} where no weights file has one")
    return value
