"""Where the time goes between a failure, or a start, and the first step after it."""

import time
from collections.abc import Iterable

from seqtrain.runtime.pulse import JOINING, STARTING
from seqtrain.runtime.watch import RankState


class Timeline:
    """Seconds of each part of a start, one after the other."""

    def __init__(self) -> None:
        self._last = self._began = time.monotonic()
        self._parts: list[tuple[str, float]] = []
        self._first: int | None = None

    def mark(self, part: str) -> None:
        """`part` has ended now, unless it had before."""
        if all(part != name for name, _ in self._parts):
            now = time.monotonic()
            self._parts.append((part, now - self._last))
            self._last = now

    def follow(self, states: Iterable[RankState], ranks: int) -> bool:
        """Marks what ranks have come past; whether it is all told: they have done a step."""
        told = list(states)
        if len(told) < ranks or not any(state.beats for state in told):
            return False
        self.mark("processes")
        if any(state.phase == JOINING for state in told):
            return False
        self.mark("group")
        if any(state.phase == STARTING for state in told):
            return False
        self.mark("model, checkpoint and data")
        step = max(state.step for state in told)
        if self._first is None:
            self._first = step
        if step <= self._first:
            return False
        self.mark("first step")
        return True

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts)
        return f"{parts}; {self._last - self._began:.1f} s in all"
