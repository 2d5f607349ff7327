"""A pool of processes on the machines of a Ray cluster, each with one model, that scores pictures."""

import hashlib
import io
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.cluster.connection import answer, check_it_is_there
from deploy.cluster.listing import is_there, read, told
from deploy.common.cli import UserError, warn
from deploy.common.files import sha256
from deploy.common.imaging import decode
from deploy.detector import Detector, Prepared

WAITED = 5.0  # seconds for rows; then it is looked whether the cluster is still there
UNREADABLE = 1000  # pictures; if not one of so many can be read, the fault is not the pictures'
DEATHS = 3  # of processes that had a picture in hand, alone; then it is told as one that cannot be read
VAIN_STARTS = 10  # processes that ended one after the other before their models were loaded; then the run ends

Row = dict[str, Any]  # of the columns in deploy/cluster/parts.py


def checksum(folder: Path) -> str:
    """Of an exported model and its thresholds: the SHA-256 of inference.yml, which holds those of the other files."""
    return sha256(folder / "inference.yml")


class Scorer:
    """One of the processes."""

    def __init__(self, folder: Path, options: dict[str, Any], model: str) -> None:
        """
        Args:
            folder, options: of the `Detector`.
            model: the checksum that it must have on this machine too.
        """
        self._folder, self._options, self._model = folder, options, model

    def load(self) -> None:
        """Load the model.

        Raises:
            UserError: it is not there, another one, or cannot be loaded.
        """
        try:
            self._detector = Detector(self._folder, **self._options)
            if checksum(self._folder) != self._model:
                raise UserError(f"{self._folder}: is another model than where this was started; share one")
        except UserError as error:
            raise UserError(f"{error} (on {socket.gethostname()})") from error

    def score(self, paths: Sequence[str], readable: str) -> list[Row]:
        """A row for each picture, with an error where it cannot be scored.

        Args:
            paths: of the pictures.
            readable: of one that some process has read; empty where none has yet.

        Raises:
            UserError: the folder of pictures is not there: one that was read is not either.
        """
        rows = [{"path": told(path), "model": self._model} for path in paths]
        batch: list[tuple[Row, Prepared]] = []
        for row, path in zip(rows, paths, strict=True):
            try:
                content = read(path)
            except (OSError, ValueError) as error:  # ValueError: what pyarrow says of a URI
                row["error"] = str(error)
                if readable and not is_there(readable):
                    raise UserError(
                        f"{path}: cannot be read, nor can {readable}, which was; are they on a disk or network that is "
                        f"not there on {socket.gethostname()}? When it is, the same command goes on"
                    ) from error
                continue
            readable = path
            row["sha256"] = hashlib.sha256(content).hexdigest()
            try:
                batch.append((row, self._detector.prepare(decode(Path(path), io.BytesIO(content)), drawable=False)))
            except UserError as error:
                row["error"] = str(error)
            if len(batch) == self._detector.batch_size:
                self._decide(batch)
                batch = []
        self._decide(batch)
        return rows

    def _decide(self, batch: Sequence[tuple[Row, Prepared]]) -> None:
        try:
            results = self._detector.decide([prepared for _, prepared in batch])
            for (row, _), result in zip(batch, results, strict=True):
                found = result.to_dict()
                row |= {name: found[name] for name in ("size", "score", "label", "regions")}
        except UserError as error:  # the run failed, for want of memory perhaps
            for row, _ in batch:
                row["error"] = str(error)


def starter(folder: Path, options: dict[str, Any], model: str, cpus: int, gpus: float) -> Callable[[], Any]:
    """What starts a `Scorer` with so many cores and GPUs on a machine of the cluster, as soon as one has them."""
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(Scorer)
    return lambda: remote.remote(folder, options, model)


def score_all(
    start: Callable[[], Any], actors: int, model: str, pieces: Iterator[Sequence[str]]
) -> Iterator[list[Row]]:
    """The rows of all pictures, as they come.

    An actor that ends, for its machine does perhaps, is replaced by another one wherever there is room; what it had in
    hand is given out again, picture by picture. So a picture that ends the process which reads it is found; it becomes
    a row with an error. Pictures that cannot be read before any could are given out again too, for then it can be told
    whether they are missing or their disk is.

    Args:
        start: starts an actor.
        actors: how many there are at a time.
        model: its checksum.
        pieces: paths, as many as an actor takes in hand.

    Raises:
        UserError: as `Scorer.load` and `Scorer.score`; actors end as soon as they start; the cluster is gone; no
            picture can be read.
    """
    calls: dict[Any, tuple[Any, Sequence[str]]] = {}  # what each actor has in hand, by the reference to its result
    idle: list[Any] = []
    again: deque[str] = deque()
    deaths: dict[str, int] = {}
    vain = 0
    readable = ""  # a picture that one of them has read
    doubtful: list[str] = []  # what could not be read before

    def hire() -> None:
        actor = start()
        calls[actor.load.remote()] = actor, ()

    for _ in range(actors):
        hire()
    while True:
        while idle and (piece := (again.popleft(),) if again else next(pieces, ())):
            actor = idle.pop()
            calls[actor.score.remote(piece, readable)] = actor, piece
        done = idle and not any(piece for _, piece in calls.values())
        if len(doubtful) >= UNREADABLE or (done and doubtful):
            raise UserError(
                f"{doubtful[0]}: cannot be read, nor can {len(doubtful) - 1} others, and not one was; are they on a "
                "disk or network that is not there? When it is, the same command goes on"
            )
        if done:
            return
        while not (ready := ray.wait(list(calls), num_returns=1, timeout=WAITED)[0]):
            check_it_is_there()
        (reference,) = ready
        actor, piece = calls.pop(reference)
        try:
            rows = answer(reference)
        except RayError as error:  # the actor, its machine, or the way to it
            reason = " ".join(str(error).split())[:300]
            warn(f"a process that scored has ended; what it had in hand is given out again ({reason})")
            ray.kill(actor)
            hire()
            vain += not piece
            if vain == VAIN_STARTS:
                raise UserError(f"{vain} processes ended while they loaded the model ({reason})") from error
            if len(piece) == 1:
                deaths[piece[0]] = deaths.get(piece[0], 0) + 1
            dead = [path for path in piece if deaths.get(path) == DEATHS]
            again += [path for path in piece if path not in dead]
            yield [
                {"path": told(path), "model": model, "error": f"{path}: ended the process that read it, {DEATHS} times"}
                for path in dead
            ]
            continue
        vain = 0
        idle.append(actor)
        readable = next((path for path, row in zip(piece, rows or (), strict=True) if "sha256" in row), readable)
        if piece and not readable:
            doubtful += piece
        elif piece:
            again += doubtful
            doubtful = []
            yield rows
