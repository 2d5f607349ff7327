"""Files are written whole: to a temporary file beside the target, then renamed over it."""

import atexit
import contextlib
import errno
import functools
import hashlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.common.cli import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot lock
LOCKED_BYTE = 2**30  # on Windows, where nobody can read what is locked
POLL = 0.05  # seconds; on Windows nothing tells that a lock is free


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


def hold_folder(folder: Path) -> Callable[[], None]:
    """Keep other processes that call this out of the folder until this one ends, be it by kill -9.

    The folder's file `.lock` says which process it is; an orderly end removes it. Where the file system cannot lock
    (some network ones), nobody is kept out. What killed processes had begun to write there is removed.

    Returns:
        what lets go of it, which the end of the process calls.

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
    for unfinished in folder.glob(_unfinished("*", ".*")):
        with contextlib.suppress(OSError):  # another process is writing it, or may remove it alone
            _remove_locked(unfinished, _open_locked(unfinished, wait=False))
    return atexit.register(functools.partial(_remove_locked, path, handle))


def put_aside(folder: Path, let_go: Callable[[], None]) -> Path:
    """Rename a folder that this process holds to `<name>.old`, or the first of `.old2`, `.old3`, ... that is free.

    Then the folder is made anew, empty, and held. Whatever ends the process meanwhile, all is there under one of its
    names.

    Args:
        folder: held.
        let_go: what `hold_folder` has returned.

    Returns:
        its new name.

    Raises:
        UserError: it cannot be renamed, or another process has taken its place at once.
    """
    names = (folder.with_name(f"{folder.name}.old{number}") for number in itertools.chain([""], itertools.count(2)))
    aside = next(path for path in names if not os.path.lexists(path))
    if not fcntl:  # Windows renames no folder in which a file is open
        atexit.unregister(let_go)
        let_go()
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be renamed to {aside.name}, to keep what it holds ({error.strerror}); move it away, or "
            "write to another folder"
        ) from error
    flush(folder.parent)
    hold_folder(make_folder(folder))
    (aside / ".lock").unlink(missing_ok=True)
    return aside


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Let `write(temporary_name)` make the file, rename it to `path`; a power cut after it does not take it away.

    The temporary name keeps the suffix of `path`, so that writers that choose a format by it work. If `write` fails,
    `path` is as it was before. What a killed process leaves is a hidden file that the next writing of `path` takes, or
    the next process that holds the folder removes.

    Raises:
        UserError: the disk is full, the folder is not writable.
    """
    make_folder(path.parent)
    temporary = path.with_name(_unfinished(path.stem, path.suffix))
    lock = temporary if fcntl else path.with_name(f".{path.name}.lock")  # Windows renames nothing that is open
    try:
        with alone(lock):
            try:
                write(str(temporary))
                flush(temporary)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within it a file is there that stands for being alone: whoever calls this with the same path waits.

    At the end it is removed, unless it was renamed. Where the file system cannot lock, nobody waits.
    """
    handle = _open_locked(path, wait=True)
    try:
        yield
    finally:
        _remove_locked(path, handle)


def flush(path: Path) -> None:
    """Wait until the disk holds the file, or the names in the folder, whatever happens to the machine then."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes for those who may write only
    except PermissionError:
        if folder:  # Windows opens none
            return
        raise
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


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unfinished(stem: str, suffix: str) -> str:
    """The name of a file while it is being written."""
    return f".{stem}.part{suffix}"


def _open_locked(path: Path, wait: bool) -> int:
    """A handle that holds the lock of the file, which is made if it is not there.

    Raises:
        BlockingIOError: another handle holds it, and this is not to wait.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle, wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
        # The holder before may have renamed or removed the file meanwhile: then this lock is one of nothing.
        if _is_at(path, handle):
            return handle
        os.close(handle)


def _lock(handle: int, wait: bool) -> None:
    """Lock an open file until it is closed, be it by the end of the process."""
    if fcntl:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
    while True:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            break
        except PermissionError as error:  # another handle holds it
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from error
            time.sleep(POLL)
    os.lseek(handle, 0, os.SEEK_SET)


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_locked(path: Path, handle: int) -> None:
    """Remove a locked file and unlock it; one that was renamed meanwhile is only unlocked."""
    if not _is_at(path, handle):
        os.close(handle)
    elif fcntl:
        path.unlink(missing_ok=True)  # before others get its lock
        os.close(handle)
    else:
        os.close(handle)  # Windows removes nothing that is open
        with contextlib.suppress(PermissionError):  # who waits has it open, and will remove it
            path.unlink(missing_ok=True)
