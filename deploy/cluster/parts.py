"""Results of scoring as a folder of Parquet files, each of them written whole; rows are added, none is changed."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from deploy.cluster.listing import Seen
from deploy.common.cli import UserError
from deploy.common.files import hold_folder, make_folder, write_whole

ROWS, SECONDS = 20_000, 30.0  # a part is written when there are so many rows, or when so much time has passed
WHOLE, REAL = pa.int32(), pa.float64()
REGION = {"box": pa.list_(WHOLE), "area": pa.int64(), "centre": pa.list_(REAL), "highest": REAL, "mean": REAL}
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "sha256": pa.string(),  # of the picture's file; null where it could not be read
        "size": pa.list_(WHOLE),  # height and width
        "score": REAL,
        "label": pa.string(),
        "regions": pa.list_(pa.struct(REGION)),
        "model": pa.string(),  # its checksum
        "error": pa.string(),  # null where there is a score
    }
)


class Parts:
    """The folder. Its end as a context manager writes the rows that are left, whatever it ends by."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, and keep other processes out of it.

        Raises:
            UserError: another one is at work there; it cannot be written to.
        """
        self.folder = make_folder(folder)
        hold_folder(folder)
        numbers = [int(found[1]) for path in self._files() if (found := re.fullmatch(r"part-(\d+)", path.stem))]
        self._next = max(numbers, default=0) + 1
        self._rows: list[dict[str, Any]] = []
        self._written = time.monotonic()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def seen(self, model: str | None) -> Seen:
        """The paths in the folder; those that the model of this checksum has scored, or None for any model's.

        Raises:
            UserError: a file is damaged, or has other columns.
        """
        seen = Seen()
        for path in self._files():
            try:
                file = pa.parquet.ParquetFile(path)
                if lacking := [name for name in SCHEMA.names if name not in file.schema_arrow.names]:
                    raise ValueError(f"it has no {', '.join(lacking)}")
                for batch in file.iter_batches(columns=["path", "model"]):
                    paths, models = (batch.column(name).cast(pa.string()).to_pylist() for name in ("path", "model"))
                    seen.fresh([path or "" for path, own in zip(paths, models, strict=True) if model in (None, own)])
            except (OSError, pa.ArrowException, ValueError) as error:
                raise UserError(f"{path}: is no part of score.py's, or damaged ({error}); move it away") from error
        return seen

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take rows, of the columns of `SCHEMA` or some of them; write a part if it is time to.

        Raises:
            UserError: as `write`.
        """
        self._rows += rows
        if len(self._rows) >= ROWS or time.monotonic() - self._written >= SECONDS:
            self.write()

    def write(self) -> None:
        """Write the rows that are not written.

        Raises:
            UserError: the disk is full; the folder is gone, that of a network perhaps.
        """
        rows, self._rows = self._rows, []
        if rows:
            if not (self.folder / ".lock").exists():
                raise UserError(f"{self.folder}: is no longer there; when it is again, the same command goes on")
            table = pa.Table.from_pylist(rows, SCHEMA)
            path = self.folder / f"part-{self._next:06d}.parquet"
            write_whole(path, lambda name: pa.parquet.write_table(table, name))
            self._next += 1
        self._written = time.monotonic()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.parquet") if not path.name.startswith("."))
