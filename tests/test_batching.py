"""The queue before a model: batches, bounds, errors, the end."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from deploy.service.batching import Batcher, Full

SOON = 10  # seconds; far beyond what anything here takes


class Doubler:
    """A model that doubles numbers, remembers its batches, and can be held up."""

    def __init__(self):
        self.batches = []
        self.running = threading.Event()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, batch):
        self.running.set()
        assert self.free.wait(SOON)
        self.batches.append(batch.tolist())
        return batch * 2, batch + 1


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
def make(doubler):
    made = []

    def make(run=doubler, max_batch_size=3, max_wait=0.0, places=16):
        made.append(Batcher(run, max_batch_size, max_wait, places))
        return made[-1]

    yield make
    doubler.free.set()
    for batcher in made:
        batcher.close()


def number(value):
    return np.float32(value)


def test_each_caller_gets_its_own_row_of_every_output(make):
    batcher = make(max_batch_size=4, max_wait=0.01)

    def ask(value):
        with batcher.place() as hand_in:
            return [float(output) for output in hand_in(number(value)).result(SOON).outputs]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(500))) == [[2 * value, value + 1] for value in range(500)]


def test_what_gathers_during_a_run_goes_together_up_to_the_limit(make, doubler):
    batcher = make(max_batch_size=3)
    doubler.free.clear()
    with batcher.place() as hand_in:
        answers = [hand_in(number(0))]
        assert doubler.running.wait(SOON)
        answers += [hand_in(number(value)) for value in range(1, 6)]
        doubler.free.set()
        sizes = [answer.result(SOON).batch_size for answer in answers]
    assert doubler.batches == [[0], [1, 2, 3], [4, 5]]
    assert sizes == [1, 3, 3, 3, 2, 2]


def test_a_single_caller_does_not_wait_for_others(make):
    batcher = make(max_wait=10 * SOON)
    with batcher.place() as hand_in:
        assert hand_in(number(1)).result(SOON).batch_size == 1


def test_a_picture_waits_for_one_that_is_on_its_way(make):
    batcher = make(max_wait=10 * SOON)
    with batcher.place() as first, batcher.place() as second:
        early = first(number(1))
        with pytest.raises(TimeoutError):
            early.result(0.05)
        assert second(number(2)).result(SOON).batch_size == 2
        assert early.result(SOON).batch_size == 2


def test_but_not_for_ever(make):
    batcher = make(max_wait=0.1)
    with batcher.place() as hand_in, batcher.place():
        answer = hand_in(number(1)).result(SOON)
    assert answer.batch_size == 1
    assert 0.1 <= answer.waited < SOON


def test_no_more_pictures_are_taken_on_than_there_are_places(make):
    batcher = make(places=2)
    with batcher.place(), batcher.place():
        assert batcher.taken == 2
        with pytest.raises(Full), batcher.place():
            pass
    with pytest.raises(ZeroDivisionError), batcher.place():
        _ = 1 / 0  # a picture that cannot be read, say
    assert batcher.taken == 0


def test_an_error_of_the_model_reaches_every_caller_and_the_next_is_served(make):
    def run(batch):
        if batch.min() < 0:
            raise ValueError("negative")
        return [batch]

    batcher = make(run)
    with batcher.place() as hand_in:
        with pytest.raises(ValueError, match="negative"):
            hand_in(number(-1)).result(SOON)
        assert hand_in(number(1)).result(SOON).outputs == [1]


def test_a_model_that_loses_rows_is_an_error(make):
    batcher = make(lambda batch: [batch, batch[:0]])
    with batcher.place() as hand_in, pytest.raises(ValueError, match="shorter"):
        hand_in(number(1)).result(SOON)


def test_a_caller_that_has_gone_takes_no_part(make, doubler):
    batcher = make()
    doubler.free.clear()
    with batcher.place() as hand_in:
        first = hand_in(number(1))
        assert doubler.running.wait(SOON)
        gone, last = hand_in(number(2)), hand_in(number(3))
        assert gone.cancel()
        doubler.free.set()
        assert first.result(SOON).batch_size == last.result(SOON).batch_size == 1
        with pytest.raises(CancelledError):
            gone.result(SOON)
    assert doubler.batches == [[1], [3]]


def test_closing_answers_what_was_handed_in_and_takes_on_nothing_more(make, doubler):
    batcher = make()
    doubler.free.clear()
    assert batcher.alive
    with batcher.place() as hand_in:
        answers = [hand_in(number(value)) for value in range(5)]
        closing = threading.Thread(target=batcher.close)
        closing.start()
        while batcher.alive:
            pass
        with pytest.raises(Full):
            hand_in(number(9))
        with pytest.raises(Full), batcher.place():
            pass
        doubler.free.set()
        closing.join(SOON)
        assert not closing.is_alive()
        assert [answer.result(SOON).outputs[0] for answer in answers] == [0, 2, 4, 6, 8]
