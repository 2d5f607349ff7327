"""Read the pickles that `paddle.save` writes without letting them run code."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import UserError

# All that Paddle's own files need: tensors become (name, array) tuples, arrays are rebuilt by numpy.
ALLOWED = {
    ("builtins", "tuple"): tuple,
    ("collections", "OrderedDict"): dict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2 name it differently
    ALLOWED[f"{module}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    ALLOWED[f"{module}.multiarray", "scalar"] = np.float32(0).__reduce__()[0]
    ALLOWED[f"{module}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


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
        return _without_names(_ArraysOnly(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: not a Paddle weights file, or damaged ({error})") from error


def _without_names(value: Any) -> Any:
    """`paddle.save` stores a tensor as the tuple (name, array): keep the array."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], np.ndarray):
        return value[1]
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_names(item) for item in value]
    return value
