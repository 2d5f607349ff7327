"""Files are written whole: to a temporary file beside the target, then renamed over it."""

import atexit
import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.common.cli import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot lock


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


def hold_folder(folder: Path) -> None:
    """Keep other processes that call this out of the folder until this one ends, be it by kill -9.

    The folder's file `.lock` says which process it is; an orderly end removes it. Where the file system cannot lock
    (some network ones), nobody is kept out.

    Raises:
        UserError: another process holds the folder, which the message names with its number and machine.
    """
    path = folder / ".lock"
    try:
        handle = _open_locked(path, wait=False)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError as error:
        owner = path.read_text(errors="replace") if path.is_file() else "unknown"
        raise UserError(f"{folder}: process {owner} is at work there; wait for its end or choose another") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    atexit.register(path.unlink, missing_ok=True)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Let `write(temporary_name)` make the file, rename it to `path`; a power cut after it does not take it away.

    The temporary name keeps the suffix of `path`, so that writers that choose a format by it work. If `write` fails,
    `path` is as it was before. What a killed process leaves is a hidden file that the next writing of `path` takes.

    Raises:
        UserError: the disk is full, the folder is not writable.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with _alone(temporary):
            write(str(temporary))
            flush(temporary)
            os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def flush(path: Path) -> None:
    """Wait until the disk holds the file, or the names in the folder, whatever happens to the machine then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot do it for a folder
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole; what is no text in a file's name is written as `\\udcXX`."""
    content = text.encode(errors="backslashreplace")
    write_whole(path, lambda name: Path(name).write_bytes(content))


def regular_file(path: Path) -> Path:
    """The same path.

    Raises:
        UserError: there is something else than a file, a pipe for example, which would be waited for without end.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file")
    return path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within it the file is there, for this process alone; it is to be renamed, and what fails removes it."""
    handle = _open_locked(path, wait=True)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _open_locked(path: Path, wait: bool) -> int:
    """A handle that holds the lock of the file, which is made if it is not there."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
        # The holder before may have renamed or removed the file meanwhile: then this lock is one of nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
