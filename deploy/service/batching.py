"""Micro-batches: pictures that come one by one, from many threads, go through the model together."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np


class Full(Exception):
    """Every place is taken, or the queue is closed; the caller should come again later."""


@dataclass(frozen=True)
class Answer:
    """What the model said of one picture."""

    outputs: Sequence[np.ndarray]  # the picture's row of every output
    waited: float  # seconds between being handed in and the run
    ran: float  # seconds of the run, of the whole batch
    batch_size: int


@dataclass(frozen=True)
class _Waiting:
    item: np.ndarray
    since: float
    answer: Future


class Batcher:
    """A bounded queue before a model, and one thread that runs the model on what has gathered in it.

    A caller first takes a place, then makes its picture ready, then hands it in. So the number of places limits how
    many pictures are held at all, and those that are refused cost nothing.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], Sequence[np.ndarray]],
        max_batch_size: int,
        max_wait: float,
        places: int,
    ) -> None:
        """
        Args:
            run: (B, ...) -> outputs, each with B rows; called from the one thread only.
            max_batch_size: the largest B.
            max_wait: seconds that a picture waits for others to join its batch, at most. It waits only while
                others hold places, so a single caller never does.
            places: the most pictures that are taken on at a time.
        """
        self._run = run
        self.max_batch_size = max_batch_size
        self._max_wait = max_wait
        self._places = places
        self._taken = 0
        self._closed = False
        self._lock = threading.Lock()  # of the two above
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()  # None: the end
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._taken

    @property
    def alive(self) -> bool:
        """Whether pictures that are handed in will be answered."""
        return self._thread.is_alive() and not self._closed

    @contextlib.contextmanager
    def place(self) -> Iterator[Callable[[np.ndarray], Future]]:
        """A place in the queue, and the function that hands a picture in and returns the future `Answer`.

        The place is free again when the block ends. A future that is cancelled before its run takes no part in it.

        Raises:
            Full: no place is free.
        """
        with self._lock:
            if self._closed or self._taken == self._places:
                raise Full
            self._taken += 1
        try:
            yield self._hand_in
        finally:
            with self._lock:
                self._taken -= 1

    def close(self) -> None:
        """Take on nothing more, answer what was handed in, then end the thread."""
        with self._lock:
            self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _hand_in(self, item: np.ndarray) -> Future:
        answer: Future = Future()
        with self._lock:  # nothing may follow the end
            if self._closed:
                raise Full
            self._queue.put(_Waiting(item, time.perf_counter(), answer))
        return answer

    def _work(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            batch = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _gather(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether more will come."""
        first = self._queue.get()
        if first is None:
            return [], False
        batch = [first]
        deadline = first.since + self._max_wait
        while len(batch) < self.max_batch_size:
            # What lies ready is taken; for more it waits only while others are on their way.
            wait = deadline - time.perf_counter() if self._taken > len(batch) else 0
            try:
                following = self._queue.get(timeout=max(wait, 0))
            except queue.Empty:
                break
            if following is None:
                return batch, False
            batch.append(following)
        return batch, True

    def _answer(self, batch: list[_Waiting]) -> None:
        begun = time.perf_counter()
        try:
            outputs = self._run(np.stack([waiting.item for waiting in batch]))
            answered = list(zip(batch, *outputs, strict=True))
        except Exception as error:  # whatever went wrong, each caller is told, and the thread lives on
            for waiting in batch:
                waiting.answer.set_exception(error)
            return
        ran = time.perf_counter() - begun
        for waiting, *rows in answered:
            waiting.answer.set_result(Answer(rows, begun - waiting.since, ran, len(batch)))
