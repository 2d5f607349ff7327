"""A folder that is watched: each picture that comes into it is scored once, a line of JSON each."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.common.cli import UserError, report_error, warn
from deploy.common.decisions import Places, json_line, places_of
from deploy.common.files import make_folder, regular_file
from deploy.common.imaging import decision_line, is_image
from deploy.detector import Detector, Prepared

POLL = 0.2  # seconds between two looks into the folder; nothing else works on every file system
SETTLED = 1.0  # seconds for which a file's size and time of change must have stayed as they are: it is whole then

State = tuple[int, float]  # size of a file in bytes, time of its last change in seconds


class FolderWatch:
    """Pictures of a folder, not of its subfolders, in the order in which they were written; hidden files are none.

    What is done is told by the lines in the file of JSON: their `path` and `modified`, when the file was changed last.
    A file that is written anew is scored again. Without that file all pictures in the folder are new at each start.
    """

    def __init__(
        self, folder: Path, save_json: str | None, output_dir: str | None, save_maps: str | None, save_masks: bool
    ) -> None:
        """
        Args:
            folder: that is watched.
            save_json: the file that lines are added to; None: they are printed.
            output_dir, save_maps, save_masks: what files to make of each picture, see `places_of`.

        Raises:
            UserError: the folder is not there; a file or folder cannot be written to.
        """
        if not folder.is_dir():
            raise UserError(f"--watch {folder}: no such folder")
        self._folder = folder
        self._output = None if output_dir is None else Path(output_dir)
        self._kinds = save_maps, save_masks
        if self._output:
            make_folder(self._output)
            if self._output.resolve() == folder.resolve():
                raise UserError(f"--output_dir {output_dir}: is the folder that is watched; drawings would be scored")
        self._done: dict[str, float] = {}
        self._lines = Path(save_json) if save_json else None
        if self._lines:
            make_folder(self._lines.parent)
            self._done = read_done(self._lines)
        self._seen: dict[Path, tuple[State, float]] = {}  # files that are not done: as they are, and since when

    def follow(self, detector: Detector) -> None:
        """Score what comes until Ctrl-C or SIGTERM; what cannot be read is told in its line, and the next ones count.

        Raises:
            OSError: a line cannot be written.
        """
        try:
            for found in self._whole():
                for start in range(0, len(found), detector.batch_size):
                    self._score(detector, found[start : start + detector.batch_size])
        except KeyboardInterrupt:
            pass  # the lines before it are whole

    def _whole(self) -> Iterator[list[tuple[Path, float]]]:
        """At each look the files that are whole and not done, with the time of their change, the oldest first."""
        away = False
        for _ in itertools.count():
            begun = time.monotonic()
            try:
                states = {path: state for path in self._folder.iterdir() if is_image(path) if (state := look(path))}
            except OSError as error:  # of a network, perhaps for a while
                if not away:
                    warn(f"{self._folder}: cannot be looked into ({error.strerror}); it is tried again")
                away = True
                time.sleep(SETTLED)
                continue
            away = False
            now = time.monotonic()
            new = {path: state for path, state in states.items() if self._done.get(str(path)) != state[1]}
            known = self._seen
            self._seen = {
                path: known[path] if path in known and known[path][0] == state else (state, now)
                for path, state in new.items()
            }
            whole = [
                (path, state[1]) for path, (state, since) in self._seen.items() if state[0] and now - since >= SETTLED
            ]
            if whole:
                yield sorted(whole, key=lambda file: (file[1], file[0]))
            else:
                time.sleep(max(POLL, 4 * (time.monotonic() - begun)))  # a look into a folder of many files takes long

    def _score(self, detector: Detector, files: Sequence[tuple[Path, float]]) -> None:
        batch: list[Prepared] = []
        told: dict[Path, dict[str, Any]] = {path: {"path": str(path), "modified": time_} for path, time_ in files}
        for path in told:
            try:
                batch.append(detector.prepare(path, drawable=self._output is not None))
            except UserError as error:
                told[path] |= failure(error)
        try:
            for prepared, result in zip(batch, detector.decide(batch), strict=True):
                told[prepared.path] |= result.to_dict()
                try:
                    self._places(prepared.path).write(result)
                except UserError as error:
                    told[prepared.path] |= failure(error)  # its score still counts
        except UserError as error:  # the run failed
            for prepared in batch:
                told[prepared.path] |= failure(error)
        for path, line in told.items():
            self._tell(path, line)

    def _places(self, path: Path) -> Places:
        return places_of([path], self._output, *self._kinds)[path] if self._output else Places()

    def _tell(self, path: Path, line: dict[str, Any]) -> None:
        self._done[str(path)] = line["modified"]
        if not self._lines:
            print(json_line(line), end="", flush=True)
            return
        with self._lines.open("a", encoding="utf-8", errors="backslashreplace") as file:  # others may move it away
            file.write(json_line(line))
        if "label" in line:
            print(decision_line(line["score"], line["threshold"], path), flush=True)


def look(path: Path) -> State | None:
    """Size and time of change of a file; None: it is gone by now."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime


def failure(error: UserError) -> dict[str, str]:
    """What a line says of an error, which is told on stderr too."""
    report_error(error)
    return {"error": str(error)}


def read_done(path: Path) -> dict[str, float]:
    """Paths and times of change in a file of lines that `FolderWatch` has written, if it is there.

    A last line that was not written to its end is cut off: its picture is scored again.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        with regular_file(path).open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read and written ({error.strerror})") from error
    done = {}
    for number, text in enumerate(content[:whole].splitlines(), start=1):
        try:
            line = json.loads(text)
            done[str(line["path"])] = float(line["modified"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is none of infer.py --watch; give --save_json another file"
            ) from error
    return done
