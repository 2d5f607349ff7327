"""Files appear whole or not at all."""

import errno
import fcntl
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy.common.cli import UserError
from deploy.common.files import hold_folder, make_folder, write_text, write_whole


def test_text_is_written_as_utf8_into_new_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "可视化\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "可视化\n".encode()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
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


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
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


def test_what_a_killed_writer_left_is_taken_by_the_next(tmp_path):
    (tmp_path / ".f.part.txt").write_text("half of something longer")
    write_text(tmp_path / "f.txt", "whole")
    assert (tmp_path / "f.txt").read_text() == "whole"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_writers_of_the_same_file_wait_for_each_other(tmp_path):
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


def test_a_name_that_is_no_text_is_written_so_that_json_can_be_read(tmp_path):
    write_text(tmp_path / "f.json", '"a\udcff"')
    assert (tmp_path / "f.json").read_bytes() == b'"a\\udcff"'
