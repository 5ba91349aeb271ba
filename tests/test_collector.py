"""The garbage collector leaves alone what a start made, and finds what comes after it."""

import gc
import weakref

import pytest

from seqtrain.collector import lasting, paused


class Ring:
    """Garbage once nobody has it: only the collector sees that."""

    def __init__(self):
        self.ring = self


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def test_no_pass_is_made_within_and_none_over_it_after():
    before = gc.get_stats()[2]["collections"]
    with lasting():
        kept = [[] for _ in range(300_000)]
    assert gc.get_stats()[2]["collections"] == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)


def test_later_garbage_is_found():
    with lasting():
        pass
    ring = weakref.ref(Ring())
    gc.collect()
    assert ring() is None


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with paused(), lasting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
