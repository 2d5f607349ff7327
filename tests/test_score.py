"""Lists of pictures and parts of results, as deploy/score.py has them; `make test-cluster` installs what they need."""

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deploy.common.cli import UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: make test-cluster")

from pyarrow import parquet  # noqa: E402

from deploy.cluster import listing, parts  # noqa: E402
from deploy.cluster.listing import Seen, blocks, read  # noqa: E402
from deploy.cluster.parts import Parts  # noqa: E402


def listed(source, column="path"):
    return [path for block in blocks(str(source), column) for path in block]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name in ("a.png", "b.JPG", ".hidden.png", "notes.txt", "below/c.png"):
        (folder / name).touch()
    return folder


def test_folders_patterns_and_lists(pictures, tmp_path, monkeypatch):
    two = {str(pictures / name) for name in ("a.png", "b.JPG")}
    assert set(listed(pictures)) == two
    assert set(listed(pictures.as_uri())) == {(pictures / name).as_uri() for name in ("a.png", "b.JPG")}
    assert listed(pictures / "a.png") == [str(pictures / "a.png")]
    assert listed((pictures / "a.png").as_uri()) == [(pictures / "a.png").as_uri()]
    assert listed(pictures.as_uri() + "/*.png") == [(pictures / "a.png").as_uri()]
    monkeypatch.chdir(tmp_path)
    assert set(listed("pictures")) == two
    assert set(listed("pictures/**/*.png")) == {str(pictures / "a.png"), str(pictures / "below/c.png")}
    paths = ["pictures/a.png", "s3://bucket/b.png", str(pictures / "b.JPG"), None]
    expected = [str(pictures / "a.png"), "s3://bucket/b.png", str(pictures / "b.JPG"), ""]
    parquet.write_table(pa.table({"other": [1, 2, 3, 4], "file": paths}), "list.parquet")
    assert listed("list.parquet", "file") == expected
    (tmp_path / "list.csv").write_text("other,path\n" + "".join(f"1,{path or ''}\n" for path in paths))
    assert listed("list.csv") == expected
    assert listed((tmp_path / "list.csv").as_uri()) == expected


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("empty", "no picture there"),
        ("nothing/*.png", "no picture there"),
        ("nothing.csv", "No such file"),
        ("broken.parquet", "cannot be read"),
        ("other.csv", "no column path; --column"),
        ("other.parquet", "no column path; --column"),
        ("empty.csv", "cannot be read"),
        ("what://bucket/folder", "cannot be read"),
        ("notes.txt", "it is no picture, and no list"),
        ("wide.csv", "a row is longer than 256 KB"),
    ],
)
def test_what_is_no_list_is_told(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "wide.csv").write_text(f"path,note\na.png,\nb.png,{'x' * 600_000}\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    parquet.write_table(pa.table({"a": ["x"]}), "other.parquet")
    with pytest.raises(UserError, match=said) as error:
        listed(source)
    assert str(error.value).startswith(f"--input {source}: ")


def test_a_long_list_is_not_held(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("path\n" + "".join(f"/archive/{i:09d}.png\n" for i in range(300_000)))
    tracemalloc.start()
    assert sum(map(len, blocks(str(path), "path"))) == 300_000
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 6e6  # a block of 16,384 paths takes 1.3 MB, and comes in three forms


@pytest.mark.parametrize("name", ["c d.png", "a%20b.png", "e#f?g.png", "ü.png", "n\udcff.png"])
def test_any_name_can_be_read(name, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / name).write_bytes(b"content")
    sources = [str(folder)] if "\udcff" in name else [str(folder), folder.as_uri()]  # URIs have no such name
    for source in sources:
        (path,) = listed(source)
        assert read(path) == b"content"
        assert listing.is_there(path)
        (folder / name).rename(tmp_path / "away")
        assert not listing.is_there(path)
        (tmp_path / "away").rename(folder / name)


def test_only_files_are_read(pictures, tmp_path):
    (pictures / "a.png").write_bytes(b"content")
    assert read(str(pictures / "a.png")) == read((pictures / "a.png").as_uri()) == b"content"
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("", str(pictures), str(tmp_path / "pipe.png"), str(tmp_path / "none.png"), "what://x"):
        with pytest.raises((OSError, ValueError)):
            read(name)


def test_seen_tells_each_path_once_in_eight_bytes():
    seen = Seen()
    assert seen.fresh(["b", "a", "b"]) == ["b", "a"]
    assert seen.fresh(["a", "c", "b"]) == ["c"]
    other = Seen(seen.digests)
    assert other.fresh(["d"]) == ["d"]
    assert seen.fresh(["d"]) == ["d"]
    random = np.random.RandomState(0)
    met = set()
    for _ in range(50):
        block = [str(number) for number in random.randint(0, 2000, 100)]
        assert other.fresh([f"p{text}" for text in block]) == [
            f"p{text}" for text in dict.fromkeys(block) if text not in met
        ]
        met.update(block)
    assert other.digests.nbytes == 8 * (4 + len(met))
    assert seen.fresh(["\udcff.png"]) and not seen.fresh(["\\udcff.png"]), "as it is told in OUT"


def row(path, model="m", **more):
    return {"path": path, "model": model, **more}


def test_parts_are_added_and_read_again(tmp_path):
    region = {"box": [1, 2, 3, 4], "area": 5, "centre": [1.5, 2.5], "highest": 0.9, "mean": 0.8}
    with Parts(tmp_path / "out") as out:
        out.add([row("a", score=0.5, label="Normal", size=[2, 3], regions=[region], sha256="00")])
        with pytest.raises(UserError, match="is at work there"):
            Parts(tmp_path / "out")
        out.write()
        out.add([row("b", error="b: broken")])
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    rows = [row for path in sorted((tmp_path / "out").glob("part*")) for row in parquet.read_table(path).to_pylist()]
    assert [row["path"] for row in rows] == ["a", "b"]
    assert rows[0]["regions"] == [region] and rows[0]["error"] is None
    assert rows[1]["score"] is None and rows[1]["error"] == "b: broken"


def test_a_part_is_written_when_it_is_long_or_old_enough(tmp_path, monkeypatch):
    out = Parts(tmp_path / "out")
    monkeypatch.setattr(parts, "ROWS", 2)
    for added, written in (("a", 0), ("b", 1), ("c", 1)):
        out.add([row(added)])
        assert len(list((tmp_path / "out").glob("part-*"))) == written
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    out.add([row("d")])
    assert len(list((tmp_path / "out").glob("part-*"))) == 2


def test_what_was_scored_by_which_model(tmp_path):
    folder = tmp_path / "out"
    with Parts(folder) as out:
        out.add([row("a"), row("b"), row("b", "other")])
    (folder / "renamed.parquet").write_bytes((folder / "part-000001.parquet").read_bytes())
    (folder / "part-000001.parquet").unlink()
    assert out.seen(None).fresh(["a", "b", "c"]) == ["c"]
    assert out.seen("other").fresh(["a", "b", "c"]) == ["a", "c"]
    (folder / "part-000007.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-000007\.parquet: is no part"):
        out.seen(None)
    parquet.write_table(pa.table({"path": ["c"], "model": ["m"]}), folder / "part-000007.parquet")
    with pytest.raises(UserError, match="it has no sha256, size, score, label, regions, error"):
        out.seen(None)


@pytest.mark.parametrize("hazard", ["full", "gone"])
def test_a_disk_that_is_full_or_gone_is_told_and_costs_no_part(hazard, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def write(_, name):
        Path(name).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError) as error, Parts(folder) as out:
        out.add([row("a")])
        out.write()
        if hazard == "full":
            monkeypatch.setattr(listing.pa.parquet, "write_table", write)
        else:
            folder.rename(tmp_path / "away")
        out.add([row("b")])
    assert ("No space left" if hazard == "full" else "is no longer there") in str(error.value)
    left = tmp_path / ("out" if hazard == "full" else "away")
    assert [path.name for path in left.iterdir() if not path.name.startswith(".lock")] == ["part-000001.parquet"]
    assert hazard == "full" or not folder.exists()
