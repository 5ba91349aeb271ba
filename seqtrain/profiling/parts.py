"""A step as a sequence of parts that do not overlap and leave nothing out, whatever the code between them does.

At any moment the thread that trains is in one part. A change of part is one reading of a clock, so the parts of a step
sum to the step by construction, and time that nobody claims is a part too: `OTHER`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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


class Clock(Protocol):
    """Readings that are turned into seconds afterwards, all at once."""

    def mark(self) -> Any:
        """The moment the thread that trains has come to."""

    def mark_here(self) -> Any:
        """The moment the caller has come to, on a thread or stream of its own."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Each mark in seconds since the clock was made."""


class HostClock:
    """The processor's clock."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def mark_here(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [mark - self._zero for mark in marks]


class CudaClock:
    """Events on the stream that trains: kernels run long after they were called, and the host's clock sees only calls.

    Time in which the device waits for the host counts for the part whose calls come late.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._zero = self.mark()

    def mark(self) -> torch.cuda.Event:
        return self._event(self._stream)

    def mark_here(self) -> torch.cuda.Event:
        return self._event(torch.cuda.current_stream(self._device))

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize(self._device)
        return [self._zero.elapsed_time(mark) / 1e3 for mark in marks]

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


class Timeline:
    """The parts of one step, as one thread goes through them. Parts nest; time counts for the innermost."""

    def __init__(self, clock: Clock) -> None:
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
        return [
            Span(part, start, end - start)
            for part, start, end in zip(self._parts[:-1], times[:-1], times[1:], strict=True)
        ]

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
    """Seconds in which something was in flight and nobody waited: of the union of one, what the other leaves over."""
    busy, waiting = _union(in_flight), _union(waits)
    overlap = sum(max(0.0, min(b, d) - max(a, c)) for a, b in busy for c, d in waiting)
    return sum(b - a for a, b in busy) - overlap


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
