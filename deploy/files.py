"""Files are written whole: to a temporary file beside the target, then renamed over it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from deploy.cli import UserError


def make_folder(path: Path) -> Path:
    """Create the folder and its parents.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: this folder is not writable; choose another or change its permissions")
    return path


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Let `write(temporary_name)` make the file, flush it to the disk, then rename it to `path`.

    The temporary name keeps the suffix of `path`, so that writers that choose a format by it work.
    If `write` fails, `path` is as it was before.

    Raises:
        UserError: the disk is full, the folder is not writable.
    """
    make_folder(path.parent)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private to the user
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
