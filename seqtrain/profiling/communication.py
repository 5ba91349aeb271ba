"""When a rank waits for others, and when messages travel while it computes.

The scan engine tells of its own waits. Collectives of torch and DeepSpeed, which tell nobody, are replaced while a
profiled step runs and put back after it: a step that isn't profiled runs the code as it is written.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d

from seqtrain.parallel.wires import Event, observed_by
from seqtrain.profiling.parts import HostClock, Part, Timeline
from seqtrain.runtime.engine import kept_collectives

COMMUNICATION = "communication"
# States of scans, tokens of neighbors, and what all ranks reduce or gather (gradients, weights, sums).
SCAN, EXCHANGE, COLLECTIVE = (Part(COMMUNICATION, what) for what in ("scan", "exchange", "collective"))
COLLECTIVES = [name for name in distributed_c10d.__all__ if re.match("all_|barrier|broadcast|reduce(_scatter|$)", name)]


class InFlight:
    """When messages were under way, from any thread."""

    def __init__(self, clock: HostClock) -> None:
        self.clock = clock
        self._marks: list[tuple[Any, Any]] = []

    def add(self, begun: Any) -> None:
        """Something that began at the mark `begun` ends now."""
        self._marks.append((begun, self.clock.mark_here()))

    def intervals(self) -> list[tuple[float, float]]:
        """Start and end in seconds, one pair per message or scan."""
        flat = self.clock.seconds([mark for pair in self._marks for mark in pair])
        return list(zip(flat[::2], flat[1::2], strict=True))


class _Pending:
    """A collective under way. It counts as in flight until it is waited for, so as an upper bound."""

    def __init__(self, work: dist.Work, timeline: Timeline, in_flight: InFlight) -> None:
        self._work, self._timeline, self._in_flight = work, timeline, in_flight
        self._begun = in_flight.clock.mark_here()

    def wait(self, *arguments: Any) -> Any:
        self._in_flight.add(self._begun)
        with self._timeline.during(COLLECTIVE):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> AbstractContextManager[Any]:
    """While open, `owner.name` (of a module, a class or one object) is `wrap` of what it was."""
    return mock.patch.object(owner, name, wrap(getattr(owner, name)))


def timed(timeline: Timeline, part: Part) -> Callable[[Callable], Callable]:
    """A wrapper that counts a function's time for `part`, on the thread this is called from; on others, nothing."""
    thread = threading.get_ident()

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*arguments, **options)
            with timeline.during(part):
                return function(*arguments, **options)

        return call

    return wrap


@contextmanager
def watched_communication(timeline: Timeline, in_flight: InFlight) -> Iterator[None]:
    """While open, `timeline` is told when this thread waits for others, `in_flight` of what travels meanwhile."""
    training = threading.get_ident()

    @contextmanager
    def scanning(event: Event) -> Iterator[None]:
        """Of what the scan engine tells: waits of the thread that trains, and scans in flight on any thread."""
        begun = in_flight.clock.mark_here()
        own = threading.get_ident() == training
        try:
            with timeline.during(EXCHANGE if event == "exchange" else SCAN) if own else nullcontext():
                yield
        finally:
            if event == "run":
                in_flight.add(begun)

    def collective(function: Callable) -> Callable:
        waited_for = timed(timeline, COLLECTIVE)(function)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            result = waited_for(*arguments, **options)
            return _Pending(result, timeline, in_flight) if isinstance(result, dist.Work) else result

        return call

    with ExitStack() as stack:
        stack.enter_context(observed_by(scanning))
        for owner, name in (*((dist, name) for name in COLLECTIVES), *kept_collectives()):
            stack.enter_context(replaced(owner, name, collective))
        yield
