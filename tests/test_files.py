"""Files appear whole or not at all."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.common import files
from deploy.common.cli import UserError
from deploy.common.files import alone, hold_folder, make_folder, put_aside, write_text, write_whole
from tests import other_systems

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["linux", "windows"])
def system(request, monkeypatch):
    """Linux, then what Windows has in its place: see tests/other_systems.py."""
    if request.param == "windows":
        monkeypatch.setattr(files, "fcntl", None)
        monkeypatch.setattr(files, "msvcrt", other_systems.msvcrt, raising=False)
        monkeypatch.delattr(os, "O_NOFOLLOW")
        for name, function in other_systems.STRICT.items():
            monkeypatch.setattr(os, name, function)


def test_text_is_written_as_utf8_into_new_folders(system, tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "可视化\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "可视化\n".encode()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(system, tmp_path, error):
    target = tmp_path / "best.pdparams"
    target.write_text("old")

    def fail(name):
        with open(name, "w") as file:
            file.write("half")
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_whole(target, fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["best.pdparams"]


def test_the_old_file_is_there_until_the_new_one_is_complete(system, tmp_path):
    target = tmp_path / "f.txt"
    target.write_text("old")

    def write(name):
        with open(name, "w") as file:
            file.write("new")
        assert target.read_text() == "old"

    write_whole(target, write)
    assert target.read_text() == "new"


def recorded(monkeypatch):
    """A list that is filled with what is flushed to the disk and what is renamed."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flush(handle):
        events.append(f"flush {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def rename(source, target):
        events.append(f"rename {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return events


def test_a_power_cut_takes_neither_the_file_nor_its_name(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    write_text(tmp_path / "f.txt", "new")
    assert events == ["flush .f.part.txt", "rename f.txt", f"flush {tmp_path.name}"]


def test_a_file_system_that_cannot_flush_a_folder_is_written_to_nevertheless(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "f.txt", "new")
    assert (tmp_path / "f.txt").read_text() == "new"


def test_the_temporary_file_keeps_the_suffix_and_is_hidden_beside_the_target(tmp_path):
    names = []

    def write(name):
        names.append(name)

    write_whole(tmp_path / "picture.jpg", write)
    (name,) = names
    assert name.endswith(".jpg")
    assert os.path.dirname(name) == str(tmp_path)
    assert os.path.basename(name).startswith(".")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "f.txt", "x")
    finally:
        assert os.umask(before) == 0o027
    assert stat.S_IMODE((tmp_path / "f.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_folder_that_cannot_be_made_is_a_user_error_that_names_it(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="file"):
        make_folder(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_target_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file"):
        write_text(tmp_path / "file" / "f.txt", "x")


def test_a_target_that_is_a_folder_is_a_user_error(tmp_path):
    (tmp_path / "f.txt").mkdir()
    with pytest.raises(UserError, match=r"f\.txt"):
        write_text(tmp_path / "f.txt", "x")
    assert os.listdir(tmp_path) == ["f.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_a_user_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="not writable"):
            write_text(tmp_path / "f.txt", "x")
    finally:
        tmp_path.chmod(0o700)


def test_what_a_killed_writer_left_is_taken_by_the_next(system, tmp_path):
    (tmp_path / ".f.part.txt").write_text("half of something longer")
    write_text(tmp_path / "f.txt", "whole")
    assert (tmp_path / "f.txt").read_text() == "whole"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_writers_of_the_same_file_wait_for_each_other(system, tmp_path):
    texts = [str(i) * 10_000 for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "f.txt", text), texts * 10))
    assert (tmp_path / "f.txt").read_text() in texts
    assert os.listdir(tmp_path) == ["f.txt"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".f.part.txt").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"f\.txt"):
        write_text(tmp_path / "f.txt", "x")
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_a_disk_that_cannot_lock_is_written_to_nevertheless(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    hold_folder(tmp_path)
    write_text(tmp_path / "f.txt", "x")
    assert (tmp_path / "f.txt").read_text() == "x"


def test_who_wants_to_be_alone_waits_for_the_others(system, tmp_path):
    (tmp_path / "count").write_text("0")

    def add_one(_):
        with alone(tmp_path / ".lock"):
            count = int((tmp_path / "count").read_text())
            time.sleep(0.001)
            (tmp_path / "count").write_text(str(count + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(80)))
    assert (tmp_path / "count").read_text() == "80"
    assert os.listdir(tmp_path) == ["count"]


def test_a_folder_is_held_once(system, tmp_path):
    hold_folder(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is at work there"):
        hold_folder(tmp_path)


def test_a_folder_that_is_held_is_held_until_its_process_ends(tmp_path):
    hold = "import sys; from pathlib import Path; from deploy.common.files import hold_folder; "
    hold += f"hold_folder(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    for killed in (True, False):
        command = [sys.executable, "-c", hold]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=f"process {process.pid} on .* is at work there"):
                hold_folder(tmp_path)
            if killed:
                process.kill()
    assert not list(tmp_path.iterdir())


# ---- put_aside


def test_who_holds_a_folder_removes_what_killed_processes_had_begun(tmp_path):
    for name in (".last.part.pdparams", ".history.part.csv", ".notes", "history.csv"):
        (tmp_path / name).touch()
    with alone(tmp_path / ".curves.part.png"):  # another process is writing it
        hold_folder(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".curves.part.png", ".notes", "history.csv", ".lock"}


def test_what_is_put_aside_is_kept_whole_and_the_new_folder_is_held(system, tmp_path):
    folder = tmp_path / "part"
    (folder / "predictions").mkdir(parents=True)
    (folder / "f.txt").write_text("kept")
    (tmp_path / "part.old").touch()  # whatever it is
    (tmp_path / "part.old2").symlink_to("nowhere")
    assert put_aside(folder, hold_folder(folder)) == tmp_path / "part.old3"
    assert sorted(path.name for path in (tmp_path / "part.old3").iterdir()) == ["f.txt", "predictions"]
    assert (tmp_path / "part.old3/f.txt").read_text() == "kept"
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with pytest.raises(UserError, match=f"{folder}: process {os.getpid()} on .* is at work there"):
        hold_folder(folder)


def test_a_folder_that_cannot_be_renamed_is_a_user_error_and_stays_held(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    folder = make_folder(tmp_path / "part")
    let_go = hold_folder(folder)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"part: cannot be renamed to part\.old.* \(Operation not permitted\); move it"):
        put_aside(folder, let_go)
    with pytest.raises(UserError, match="is at work there"):
        hold_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


PUT_ASIDE = """
import sys
from pathlib import Path
from deploy.common.files import hold_folder, put_aside
folder = Path(sys.argv[1])
let_go = hold_folder(folder)
print("held", flush=True)
sys.stdin.readline()
put_aside(folder, let_go)
print("aside", flush=True)
sys.stdin.readline()
"""


def test_nobody_puts_the_folder_of_another_process_aside(tmp_path):
    folder = make_folder(tmp_path / "part")
    command = [sys.executable, "-c", PUT_ASIDE, folder]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        for word in ("held", "aside"):  # before and after
            assert process.stdout.readline() == f"{word}\n"
            with pytest.raises(UserError, match=f"process {process.pid} on .* is at work there"):
                hold_folder(folder)
            process.stdin.write("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "part.old"]
    assert not list(folder.iterdir()) and not list((tmp_path / "part.old").iterdir()), "an orderly end leaves no locks"


def test_a_name_that_is_no_text_is_written_so_that_json_can_be_read(tmp_path):
    write_text(tmp_path / "f.json", '"a\udcff"')
    assert (tmp_path / "f.json").read_bytes() == b'"a\\udcff"'
