"""Lists of pictures of any length, gone through without being held: folders, patterns, Parquet and CSV."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pyarrow import fs

from deploy.common.cli import UserError
from deploy.common.imaging import SUFFIXES, matches, named_like_image

BLOCK = 16_384  # paths that are looked at together
READ_AHEAD = 256 * 2**10  # bytes of a CSV file; pyarrow keeps many times as much in memory


def blocks(source: str, column: str) -> Iterator[list[str]]:
    """The paths of the pictures, in blocks. Those of this machine are absolute, others are URIs; some may come twice.

    Args:
        source: a folder, a picture, a pattern, or a file .parquet or .csv with a column of paths; or the URI of one of
            these in what pyarrow has file systems for (s3://, gs://, hdfs://, file://), a pattern with * in its last
            part alone.
        column: of such a file.

    Raises:
        UserError: there is no such thing, no picture in it, or no such column.
    """
    with _named(source):
        paths = _paths(source, column)
        first = list(itertools.islice(paths, BLOCK))
        if not first:
            raise UserError(f"--input {source}: no picture there ({' '.join(SUFFIXES)})")
        yield first
        while block := list(itertools.islice(paths, BLOCK)):
            yield block


def read(path: str) -> bytes:
    """What is in a picture file, by its path or URI; `path` may also be a named pipe's, which is refused.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if "://" not in path:  # whose name pyarrow takes in UTF-8 only
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file")
        with open(path, "rb") as file:
            return file.read()
    system, name = fs.FileSystem.from_uri(path)
    if system.get_file_info(name).type != fs.FileType.File:
        raise FileNotFoundError(f"{path}: no such file")
    with system.open_input_stream(name) as stream:
        return stream.read()


def is_there(path: str) -> bool:
    """Whether the file can be seen at the moment."""
    if "://" not in path:
        return os.path.exists(path)
    try:
        system, name = fs.FileSystem.from_uri(path)
        return system.get_file_info(name).type != fs.FileType.NotFound
    except OSError:
        return False


class Seen:
    """Which paths were met before. Each takes eight bytes of memory; of ten million, two are mistaken for the same with
    a probability of 3 in a million."""

    def __init__(self, digests: np.ndarray | None = None) -> None:
        """`digests`: those of another one, (N,) uint64, sorted."""
        self.digests = np.empty(0, np.uint64) if digests is None else digests

    def fresh(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that were not met before, each once and in their order. Now they are met."""
        whole = b"".join(hashlib.blake2b(told(path).encode(), digest_size=8).digest() for path in paths)
        digests, first = np.unique(np.frombuffer(whole, np.uint64), return_index=True)
        place = np.searchsorted(self.digests, digests)
        known = place < len(self.digests)
        known[known] = self.digests[place[known]] == digests[known]
        self.digests = np.insert(self.digests, place[~known], digests[~known])
        return [paths[i] for i in np.sort(first[~known])]


def told(path: str) -> str:
    """The path as text in UTF-8, with escapes for what is none in the name of a file."""
    return path.encode(errors="backslashreplace").decode()


def _paths(source: str, column: str) -> Iterator[str]:
    if source.lower().endswith((".parquet", ".csv")):
        yield from map(_absolute, _listed(source, column))
    elif "://" in source:
        yield from _below(source)
    elif os.path.isdir(source):
        with os.scandir(source) as entries:
            for entry in entries:
                if named_like_image(entry.name) and entry.is_file():
                    yield os.path.abspath(entry.path)
    elif not os.path.exists(source):
        yield from (os.path.abspath(match) for match in matches(source) if not match.is_dir())
    elif source.lower().endswith(SUFFIXES):
        yield _absolute(source)
    else:
        raise ValueError("it is no picture, and no list .parquet or .csv")


def _below(source: str) -> Iterator[str]:
    """The URIs of the pictures in a folder, or of those that match the pattern behind it; or of this one picture."""
    uri = urlsplit(source)
    folder, _, pattern = uri.path.rpartition("/")
    if "*" not in pattern:
        folder, pattern = uri.path.rstrip("/"), "*"
    system, path = fs.FileSystem.from_uri(uri._replace(path=folder).geturl())
    kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        for info in system.get_file_info(fs.FileSelector(path)):
            if info.is_file and named_like_image(info.base_name) and fnmatch(info.base_name, pattern):
                yield uri._replace(path=f"{folder}/{quote(info.base_name)}").geturl()
    elif kind == fs.FileType.File:
        yield source


def _listed(source: str, column: str) -> Iterator[str]:
    """The column of a file, read as it is asked for."""
    system, path = fs.FileSystem.from_uri(source) if "://" in source else (fs.LocalFileSystem(), source)
    try:
        with system.open_input_file(path) as file:
            if path.lower().endswith(".parquet"):
                batches = pa.parquet.ParquetFile(file).iter_batches(BLOCK, columns=[column])
            else:
                convert = pa.csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
                how = pa.csv.ReadOptions(use_threads=False, block_size=READ_AHEAD)
                batches = pa.csv.open_csv(file, how, convert_options=convert)
            for batch in batches:
                yield from (path or "" for path in batch.column(column).cast(pa.string()).to_pylist())
    except KeyError as error:
        raise ValueError(f"it has no column {column}; --column names another") from error
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):
            raise
        most = READ_AHEAD // 2**10
        raise ValueError(f"a row is longer than {most} KB; give a list with the column of paths alone") from error


def _absolute(path: str) -> str:
    return path if "://" in path or not path else os.path.abspath(path)


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Turn what pyarrow and the system raise into a UserError that names the list."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"--input {source}: cannot be read ({error})") from error
