"""Batches are read by a thread while steps are computed: the same ones, and none is waited for but the first."""

import threading

import pytest

from seqtrain.errors import DataError
from seqtrain.runtime.read_ahead import AHEAD, ReadAhead

LIMIT = 30.0


class Store:
    """Gives steps their own numbers; each read takes until `allowed`, and is noted in `begun`."""

    def __init__(self, broken=-1):
        self.begun, self.broken = [], broken
        self.read = {number: threading.Event() for number in range(20)}
        self.allowed = threading.Semaphore(0)

    def __call__(self, step):
        self.begun.append(step)
        assert self.allowed.acquire(timeout=LIMIT)
        if step == self.broken:
            raise DataError("train-00003.bin: checksum")
        self.read[step].set()
        return step


def test_no_step_waits_that_computes_as_long_as_two_are_read():
    store = Store()
    with ReadAhead(store, stop=8).running() as read:
        store.allowed.release()
        for step in range(8):
            assert read(step) == step
            # The step is computed meanwhile: the store is slow, but gives the next one or two before it is done.
            store.allowed.release(2 if step == 0 else 1)
            for coming in range(step + 1, min(step + 1 + AHEAD, 8)):
                assert store.read[coming].wait(LIMIT)
    # The first may have been there by the time it was looked for.
    assert read.waits <= 1
    # Each once, in order, none beyond the last step.
    assert store.begun == list(range(8))


def test_a_resumed_run_begins_anywhere():
    store = Store()
    store.allowed.release(40)
    with ReadAhead(store, stop=9).running() as read:
        assert [read(7), read(8)] == [7, 8]
    assert store.begun == [7, 8]


def test_an_error_comes_at_the_step_it_concerns():
    store = Store(broken=2)
    store.allowed.release(20)
    with ReadAhead(store, stop=9).running() as read:
        assert [read(step) for step in range(2)] == [0, 1]
        with pytest.raises(DataError, match="train-00003"):
            read(2)


def test_no_thread_is_left():
    before, store = threading.active_count(), Store()
    store.allowed.release(2)

    def stopped():
        with ReadAhead(store, stop=9).running() as read:
            read(0)
            store.allowed.release(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert threading.active_count() == before
