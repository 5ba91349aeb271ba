"""Waits for other ranks are told apart from work, and what is replaced is put back."""

import threading
from contextlib import suppress
from types import SimpleNamespace

import deepspeed.comm
import torch
import torch.distributed as dist

from seqtrain.parallel import all_scan
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.testing import run_ranks
from seqtrain.profiling import communication
from seqtrain.profiling.communication import COLLECTIVE, EXCHANGE, SCAN, InFlight, replaced, timed
from seqtrain.profiling.parts import OTHER, HostClock, Timeline, seconds_by_part
from tests.profiling.profiling_cases import CountingClock


class Counted:
    def work(self):
        return "done"


def test_a_name_is_what_it_was_afterwards():
    one = Counted()
    with suppress(ZeroDivisionError), replaced(one, "work", lambda function: lambda: function() + "!"):
        assert one.work() == "done!"
        assert Counted().work() == "done"
        raise ZeroDivisionError
    assert one.work() == "done"
    assert vars(one) == {}
    own = vars(Counted)["work"]
    with replaced(Counted, "work", lambda function: lambda self: "other"):
        assert one.work() == "other"
    assert vars(Counted)["work"] is own


def test_calls_on_other_threads_are_not_this_threads_time():
    timeline = Timeline(CountingClock())
    timeline.start()
    call = timed(timeline, SCAN)(lambda: timeline.now)
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert found == [OTHER]
    assert call() == SCAN


def watched_step(rank):
    """A collective, one that is waited for later, a scan and a message: what was seen of them, and if it is undone."""
    deepspeed.comm.comm.cdb = SimpleNamespace(all_gather_function=print, reduce_scatter_function=print)
    timeline = Timeline(HostClock())
    in_flight = InFlight(timeline.clock)
    original, one = dist.all_reduce, torch.ones(3)
    with communication.watched_communication(timeline, in_flight):
        timeline.start()
        dist.all_reduce(one)
        work = dist.all_reduce(one, async_op=True)
        assert timeline.now == OTHER
        work.wait()
        state = scanned()
        send_to_each_other(engine_of(dist.group.WORLD.group_name), rank)
        spans = timeline.stop()
    scanned()
    undone = dist.all_reduce is original
    return one[0].item(), state[0, 0, 0, 0].item(), seconds_by_part(spans), len(in_flight.intervals()), undone


def scanned():
    return all_scan(None, torch.full((1, 1, 2, 2), 5.0), group=dist.group.WORLD, algorithm="tree")[0]


def send_to_each_other(engine, rank):
    """A message outside the scans, from either rank to the other."""
    arrived = torch.zeros(1)
    with engine.messages("a test", torch.device("cpu")) as wire:
        wire.post(arrived, 1 - rank)
        wire.send(torch.ones(1), 1 - rank)
        wire.receive_exchange()
    assert arrived.item() == 1


def test_ranks_that_wait_for_each_other_say_so():
    for rank, (reduced, state, parts, messages, undone) in enumerate(run_ranks(2, watched_step)):
        assert (reduced, state) == (4.0, 5.0 * rank)
        assert set(parts) == {OTHER, COLLECTIVE, SCAN, EXCHANGE}
        assert all(seconds > 0 for seconds in parts.values())
        # The collective that was waited for later, and the scan; not the one after it, when nobody was watching.
        assert messages == 2
        assert undone
