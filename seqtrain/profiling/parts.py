"""A step as a sequence of parts that do not overlap and leave nothing out, whatever the code between them does.

At any moment the thread that trains is in one part. A change of part is one reading of a clock, so the parts of a step
sum to the step by construction, and time that nobody claims is a part too: `OTHER`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """What a step is doing: a kind of work, in which pass, in which layer (-1: in none)."""

    kind: str
    phase: str = ""
    layer: int = -1


FORWARD, BACKWARD, RECOMPUTATION = "forward", "backward", "recomputation"
OTHER = Part("other")


@dataclass(frozen=True)
class Span:
    """One stay in a part; seconds from the clock's own zero."""

    part: Part
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


class HostClock:
    """The processor's clock. Readings are turned into seconds afterwards, all at once."""

    def __init__(self) -> None:
        self._zero: Any = self.mark()

    def mark(self) -> Any:
        """The moment the thread that trains has come to."""
        return time.perf_counter()

    def mark_here(self) -> Any:
        """The moment the caller has come to, on a thread or stream of its own."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Each mark in seconds since the clock was made."""
        return [mark - self._zero for mark in marks]


class CudaClock(HostClock):
    """Events on the stream that trains: kernels run long after they were called, and the host's clock sees only calls.

    Time in which the device waits for the host counts for the part whose calls come late.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.current_stream(device)
        super().__init__()

    def mark(self) -> Any:
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))

    def mark_here(self) -> Any:
        stream = torch.cuda.current_stream(self._device)
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        torch.cuda.synchronize(self._device)
        return [self._zero.elapsed_time(mark) / 1e3 for mark in marks]


class Timeline:
    """The parts of one step, as one thread goes through them. Parts nest; time counts for the innermost."""

    def __init__(self, clock: HostClock) -> None:
        self.clock = clock
        self._stack: list[Part] = []
        self._marks: list[Any] = []
        self._parts: list[Part] = []

    @property
    def now(self) -> Part:
        """The part the thread is in."""
        return self._stack[-1]

    def start(self) -> None:
        """Begins the step, in `OTHER`."""
        self._stack, self._marks, self._parts = [OTHER], [], []
        self._changed()

    def enter(self, part: Part) -> None:
        """Goes into `part`, until `leave`."""
        self._stack.append(part)
        self._changed()

    def leave(self) -> None:
        """Goes back to the part around this one."""
        self._stack.pop()
        self._changed()

    def switch(self, part: Part) -> None:
        """Leaves this part for `part`: for the backward pass, where the end of one module is the start of another."""
        self._stack[-1] = part
        self._changed()

    @contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """In `part` while the context is open, whatever was left open inside it."""
        depth = len(self._stack)
        self.enter(part)
        try:
            yield
        finally:
            del self._stack[depth:]
            self._changed()

    def stop(self) -> list[Span]:
        """Ends the step: its spans, each beginning where the one before ends."""
        self._changed()
        times = self.clock.seconds(self._marks)
        return [Span(part, a, b - a) for part, a, b in zip(self._parts[:-1], times[:-1], times[1:], strict=True)]

    def _changed(self) -> None:
        self._marks.append(self.clock.mark())
        self._parts.append(self._stack[-1])


def seconds_by_part(spans: Iterable[Span]) -> dict[Part, float]:
    """Seconds of each part, in the order in which the parts were first met."""
    sums: dict[Part, float] = {}
    for span in spans:
        sums[span.part] = sums.get(span.part, 0.0) + span.seconds
    return sums


def hidden_seconds(in_flight: Iterable[tuple[float, float]], waits: Iterable[tuple[float, float]]) -> float:
    """Seconds in which something was in flight and nobody waited."""
    ends = sorted(
        (moment, kind, change)
        for kind, intervals in enumerate((in_flight, waits))
        for interval in intervals
        for moment, change in zip(interval, (1, -1), strict=True)
    )
    hidden, before, under_way = 0.0, 0.0, [0, 0]
    for moment, kind, change in ends:
        if under_way[0] and not under_way[1]:
            hidden += moment - before
        under_way[kind] += change
        before = moment
    return hidden
