"""Read the pickles that `paddle.save` writes, without Python's unpickler, which would run what they ask for.

A pickle is a program for a small stack machine. The machine below knows only the instructions that build containers,
texts and numbers, and in the place of functions only the stand-ins in `FUNCTIONS`. Arrays are made of a plain number
type, a shape and bytes. Neither time nor memory grows beyond what the file's size warrants.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.common.cli import UserError
from deploy.common.files import regular_file

NUMBER_TYPE = re.compile(r"[biuf]\d")  # bool, integers, floats; never objects, whose bytes would be pointers
PADDLES_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own key in a saved state_dict
MOST_BYTES = 2**32  # of a file; the largest shipped configuration writes 0.5 GB
MOST_VALUES = 1_000_000  # a history of 100,000 epochs
MOST_CHARACTERS = 10 * MOST_VALUES  # of texts, keys included, counted in each place that they are in
MOST_INSTRUCTIONS = 3 * MOST_VALUES  # an epoch of the history takes 20 for its 9 values
LARGEST_KEY = 2**31  # beyond it numbers can be chosen that all have the same hash, so that each finds its place late
MOST_DIMENSIONS = 32


class _Refused(Exception):
    """What no weights file holds."""


class _NumberType:
    """Stands in for numpy.dtype(name, False, True)."""

    def __init__(self, name: str, *_: Any) -> None:
        if not NUMBER_TYPE.fullmatch(_of(str, name)):
            raise _Refused(f"an array of {name!r:.99}, not of numbers")
        self.dtype = np.dtype(name)

    def build(self, state: tuple) -> None:
        if state[1] == ">":
            raise _Refused("numbers in the byte order of machines that Paddle does not run on")


class _Array:
    """Stands in for an array: numpy.core.multiarray._reconstruct(ndarray, (0,), b"b") and its state."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, number_type, fortran, data = state
        self.value = _make_array(number_type, shape, data, "F" if fortran else "C")


def _scalar(number_type: _NumberType, data: bytes) -> Any:
    """numpy.core.multiarray.scalar"""
    return _make_array(number_type, (), data, "C")[()]


def _make_array(number_type: _NumberType, shape: tuple[int, ...], data: bytes, order: str) -> np.ndarray:
    """A view of the data, which takes no memory of its own."""
    if not isinstance(number_type, _NumberType) or not isinstance(data, bytes):
        raise _Refused("an array that is not made of plain bytes")
    sides = [_of(int, side) for side in shape[:MOST_DIMENSIONS]]
    if len(sides) < len(shape) or math.prod(sides) * number_type.dtype.itemsize != len(data):
        raise _Refused("an array whose shape and bytes do not agree")
    return np.frombuffer(data, number_type.dtype).reshape(sides, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """_codecs.encode, which older pickle protocols need for bytes."""
    if _of(str, encoding) != "latin1":
        raise _Refused(f"text in the encoding {encoding!r:.99}")
    return text.encode("latin1")


def _tuple(values: tuple) -> tuple:
    """tuple, which makes no copy of a tuple."""
    return _of(tuple, values)


def _ordered_dict() -> dict:
    """collections.OrderedDict"""
    return {}


def _ndarray(*_: Any) -> None:
    """numpy.ndarray, which is only named, never called."""
    raise _Refused("a call of numpy.ndarray")


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "tuple"): _tuple,
    ("__builtin__", "tuple"): _tuple,
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _NumberType,
}
for module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 name it differently
    FUNCTIONS[f"{module}.multiarray", "_reconstruct"] = _Array
    FUNCTIONS[f"{module}.multiarray", "scalar"] = _scalar


class _Budget:
    """What the values of a file may still come to. Few can be in the file, each in many places."""

    def __init__(self) -> None:
        self._values, self._characters = MOST_VALUES, MOST_CHARACTERS

    def spend_value(self) -> None:
        self._values -= 1
        if self._values < 0:
            raise _Refused(f"more than {MOST_VALUES} values")

    def spend_text(self, value: Any) -> None:
        """Nothing for a value that is no text."""
        self._characters -= len(value) if isinstance(value, str | bytes) else 0
        if self._characters < 0:
            raise _Refused(f"texts of more than {MOST_CHARACTERS} characters")


def load_pickle(path: Path) -> Any:
    """Arrays, containers, numbers and strings of a `.pdparams` file; tensors come back as arrays.

    Raises:
        UserError: missing, damaged, too large, or holding anything else (such files can run code when unpickled).
    """
    try:
        size = regular_file(path).stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: has {size} bytes; a weights file has {MOST_BYTES} at most, so it is not loaded")
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", "it does not fit into the memory")
        raise UserError(f"{path}: cannot be read ({reason})") from error
    try:
        return _plain(_run(data), _Budget())
    except _Refused as error:
        raise UserError(f"{path}: holds {error}; no weights file needs that, so it is not loaded") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: not a Paddle weights file, or damaged ({error})") from error


def _run(data: bytes) -> Any:
    """The value that the instructions build, with stand-ins for its arrays."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    decoded = 0  # bytes that `_latin1` has made

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count == MOST_INSTRUCTIONS:  # a byte can ask for an object of 64
            raise _Refused(f"more than {MOST_INSTRUCTIONS} instructions")
        match opcode.name:
            case "PROTO":
                if argument > pickle.HIGHEST_PROTOCOL:
                    raise _Refused(f"protocol {argument}")
            case "FRAME":
                pass
            case "STOP":
                (value,) = stack
                return value
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                _of(list, stack[-1]).append(value)
            case "APPENDS":
                values = since_mark()
                _of(list, stack[-1]).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                _of(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                values = since_mark()
                for key, value in zip(values[::2], values[1::2], strict=True):
                    _of(dict, stack[-1])[_key(key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_function(*argument.split(" ")))  # pickletools puts a space between the two
            case "STACK_GLOBAL":
                names = stack[-2:]
                stack[-2:] = [_function(*names)]
            case "REDUCE":
                function, arguments = stack[-2:]
                result = function(*_of(tuple, arguments))  # nothing that can be called gets here but FUNCTIONS
                decoded += len(result) if isinstance(result, bytes) else 0
                if decoded > len(data):
                    raise _Refused("the same bytes many times")
                stack[-2:] = [result]
            case "BUILD":
                state = stack.pop()
                _of(_NumberType | _Array, stack[-1]).build(state)
            case _:
                raise _Refused(f"the instruction {opcode.name}")
    raise _Refused("no end")


def _function(module: str, name: str) -> Callable[..., Any]:
    if (_of(str, module), _of(str, name)) not in FUNCTIONS:
        raise _Refused(repr(f"{module:.99}.{name:.99}"))  # a terminal would obey what may be in it
    return FUNCTIONS[module, name]


def _key(value: Any) -> str | int:
    """The value, if a dictionary may have it as a key."""
    if isinstance(value, int) and abs(value) >= LARGEST_KEY:
        raise _Refused("a key that is a large number")
    return _of(str | int, value)


def _of(kind: Any, value: Any) -> Any:
    """The value, if it is of this kind."""
    if not isinstance(value, kind):
        raise _Refused(f"a {type(value).__name__} where no weights file has one")
    return value


def _plain(value: Any, budget: _Budget) -> Any:
    """Stand-ins become arrays; `paddle.save` stores a tensor as (name, array), of which the array is kept."""
    budget.spend_value()
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        value = value[1]
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        for key in value:
            budget.spend_text(key)
        return {key: _plain(item, budget) for key, item in value.items() if key != PADDLES_NAME_TABLE}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, budget) for item in value)
    budget.spend_text(value)
    return _of(str | bytes | int | float | np.generic | None, value)
