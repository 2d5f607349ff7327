"""Read the pickles that `paddle.save` writes without letting them run code.

Nothing of numpy or Paddle is called while the pickle is read: arrays are collected by the small stand-ins below, and
made only afterwards, from a plain number type, a shape and bytes.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import UserError

NUMBER_TYPE = re.compile(r"[biuf]\d")  # bool, integers, floats; never objects, whose bytes would be pointers
PADDLES_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own key in a saved state_dict


class _NumberType:
    """Stands in for numpy.dtype(name, False, True)."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or not NUMBER_TYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, not of numbers")
        self.name = name
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands in for an array: numpy.core.multiarray._reconstruct(ndarray, (0,), b"b") and its state."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, number_type, fortran, data = state
        self.value = _make_array(number_type, shape, data, "F" if fortran else "C")


class _NoCall:
    """Stands in for numpy.ndarray, which is only named, never called."""

    def __init__(self, *_: Any) -> None:
        raise pickle.UnpicklingError("it calls numpy.ndarray")


def _scalar(number_type: _NumberType, data: bytes) -> Any:
    """numpy.core.multiarray.scalar"""
    return _make_array(number_type, (), data, "C")[()]


def _latin1(text: str, encoding: str) -> bytes:
    """_codecs.encode, which older pickle protocols need for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _make_array(number_type: _NumberType, shape: tuple[int, ...], data: bytes, order: str) -> np.ndarray:
    if not isinstance(number_type, _NumberType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("it holds an array that is not made of plain bytes")
    dtype = np.dtype(number_type.order + number_type.name)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise pickle.UnpicklingError("it holds an array whose shape and bytes do not agree")
    return np.frombuffer(data, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))


ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _NoCall,
    ("numpy", "dtype"): _NumberType,
}
for module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 name it differently
    ALLOWED[f"{module}.multiarray", "_reconstruct"] = _Array
    ALLOWED[f"{module}.multiarray", "scalar"] = _scalar


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights file needs; not loaded")
        return ALLOWED[module, name]


def load_pickle(path: Path) -> Any:
    """Arrays, containers, numbers and strings of a `.pdparams` file; tensors come back as arrays.

    Raises:
        UserError: missing, damaged, or holding anything else (such files can run code when unpickled).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _plain(_ArraysOnly(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: not a Paddle weights file, or damaged ({error})") from error


def _plain(value: Any) -> Any:
    """Stand-ins become arrays; `paddle.save` stores a tensor as (name, array), of which the array is kept."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != PADDLES_NAME_TABLE}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        return value[1].value
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
