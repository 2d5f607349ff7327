"""What Windows lacks is hidden from a script: python tests/other_systems.py SCRIPT OPTIONS. No test is in here.

Only our own code is to notice it, so what others import of it is imported before. As on Windows, locks are msvcrt's,
what is open is neither renamed nor removed, no folder is opened, and only what may be written is flushed.
"""

import asyncio  # noqa: F401
import errno
import fcntl
import multiprocessing.util  # noqa: F401
import os
import runpy
import shutil
import signal
import subprocess  # noqa: F401
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

HIDDEN_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
HIDDEN_NAMES = {
    os: ("O_NOFOLLOW", "fork", "geteuid", "posix_fallocate", "sched_getaffinity"),
    signal: ("SIGHUP", "SIGKILL", "pthread_sigmask"),
}


def locking(handle: int, mode: int, _: int) -> None:
    """`msvcrt.locking` as far as it is used."""
    assert mode == LK_NBLCK
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


LK_NBLCK = 2
msvcrt = types.SimpleNamespace(LK_NBLCK=LK_NBLCK, locking=locking)


def flush(handle: int) -> None:
    """`os.fsync`, which flushes only what may be written."""
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    FSYNC(handle)


def is_open(path: os.PathLike | str) -> bool:
    """Whether this process has it, or something in it, open."""
    path = os.path.realpath(path)
    for handle in os.listdir("/proc/self/fd"):
        try:
            if f"{os.readlink(f'/proc/self/fd/{handle}')}/".startswith(f"{path}/"):
                return True
        except FileNotFoundError:
            pass
    return False


def strict(function: Callable, *, checked: int) -> Callable:
    """The function of `os`, which refuses its first arguments if they are open."""

    def refusing(*args: object, **kwargs: object) -> object:
        with ONE_STEP:
            for path in args[:checked]:
                if is_open(path):
                    raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
            return function(*args, **kwargs)

    return refusing


def no_folders(path: os.PathLike | str, *args: object, **kwargs: object) -> int:
    """`os.open`, which opens no folder."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    with ONE_STEP:
        return OPEN(path, *args, **kwargs)


ONE_STEP = threading.RLock()  # to look whether a file is open, and to remove it; no thread opens it between the two
OPEN, FSYNC = os.open, os.fsync
# Functions of `os` as Windows has them.
STRICT = {
    "rename": strict(os.rename, checked=1),
    "replace": strict(os.replace, checked=2),
    "unlink": strict(os.unlink, checked=1),
    "open": no_folders,
    "fsync": flush,
}


class Hidden:
    """Finds nothing."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in HIDDEN_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide() -> None:
    """Take away, from here on, what Windows lacks."""
    for name in HIDDEN_MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Hidden())
    sys.modules["msvcrt"] = msvcrt
    for module, names in HIDDEN_NAMES.items():
        for name in names:
            delattr(module, name)
    for name, function in STRICT.items():
        setattr(os, name, function)
    shutil._use_fd_functions = False  # which opens folders
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile


def main() -> None:
    hide()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
