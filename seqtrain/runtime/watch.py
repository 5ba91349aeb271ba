"""Which rank hangs, by what all of them tell: see `runtime.pulse`."""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seqtrain.runtime.pulse import ENDING, PHASES

# Seconds without progress after which ranks that are behind are named.
NAMED_SECONDS = 30.0
# Seconds a process may be stopped (SIGSTOP) while others of its run are not.
STOPPED_SECONDS = 20.0
# A step's limit, where it follows what was measured: so many median steps, and so many seconds at least.
STEPS, LEAST_SECONDS = 5, 60.0
# Most seconds between two looks that are counted: who looks may have been stopped, too.
LONGEST_LOOK = 5.0
# Phases that take long, and as long as they like: in them only exchanges are progress.
STEADY = ("step", "data", "between")


@dataclass(frozen=True)
class RankState:
    """A rank as its machine's `Host` sees it. `status`: of its exit, None while it runs; `said`: its last words."""

    rank: int
    pid: int
    status: int | None
    stopped: bool
    said: str
    beats: int
    exchanges: int
    step: int
    phase_number: int
    noticed: int

    @property
    def phase(self) -> str:
        return PHASES[self.phase_number]

    def where(self) -> str:
        """What it is doing, for people."""
        after = f" after step {self.step}" if self.step >= 0 else ""
        return f"in {self.phase}{after}" if self.phase in ("step", "data", "evaluation") else f"{self.phase}{after}"


class Watch:
    """Looks at the ranks of a group again and again.

    `step_seconds`: limit of a step; 0: it follows the steps measured. `section_seconds`: limit without any progress
    while they start, save, evaluate and end, and of the first step.
    """

    def __init__(self, *, step_seconds: float, section_seconds: float):
        self.step_seconds, self.section_seconds = step_seconds, section_seconds
        # Of our own: it doesn't go on while nobody looks.
        self.clock = 0.0
        self._now: float | None = None
        self._seen: dict[int, tuple[int, ...]] = {}
        # When anyone came further; when a rank was first seen as stopped.
        self._progress = 0.0
        self._stopped: dict[int, float] = {}
        self._step, self._stepped = -1, 0.0
        self._steps: deque[float] = deque(maxlen=21)
        self._named = False

    def limit(self, states: Sequence[RankState]) -> float:
        """Seconds without progress that are allowed now."""
        if not self._steps or any(state.phase not in STEADY for state in states):
            return self.section_seconds
        return self.step_seconds or max(LEAST_SECONDS, STEPS * statistics.median(self._steps))

    def look(self, states: Sequence[RankState], now: float) -> None:
        """Takes note of the ranks as they are at `now` seconds."""
        if self._now is not None:
            self.clock += min(now - self._now, LONGEST_LOOK)
        self._now = now
        for state in states:
            seen = (state.exchanges, state.step, state.phase_number)
            if self._seen.get(state.rank) != seen:
                self._seen[state.rank] = seen
                self._progress, self._named = self.clock, False
        running = [state for state in states if state.status is None]
        stopped = {state.rank for state in running if state.stopped}
        # All of them: somebody has put the run aside.
        if len(stopped) == len(running):
            self._progress, stopped = self.clock, set()
        self._stopped = {rank: self._stopped.get(rank, self.clock) for rank in stopped}
        step = max((state.step for state in states), default=-1)
        if step > self._step:
            # The first is where they begin, the second the first that is done.
            if self._step >= 0 and all(state.phase in STEADY for state in states):
                self._steps.append((self.clock - self._stepped) / (step - self._step))
            self._step, self._stepped = step, self.clock

    def hung(self, states: Sequence[RankState]) -> list[RankState]:
        """The ranks to blame where the group hangs: first the one that most likely keeps the others."""
        for rank, since in self._stopped.items():
            if self.clock - since >= STOPPED_SECONDS:
                return [state for state in states if state.rank == rank]
        if self.clock - self._progress < self.limit(states):
            return []
        return self.behind(states) or list(states[:1])

    def slow(self, states: Sequence[RankState]) -> list[RankState]:
        """The ranks that the others have waited for long enough to say so; once until there is progress again."""
        steady = all(state.phase in STEADY for state in states)
        patience = max(NAMED_SECONDS, 2 * statistics.median(self._steps)) if self._steps and steady else 60.0
        if self._named or self.clock - self._progress < patience:
            return []
        self._named = True
        return self.behind(states)

    def behind(self, states: Sequence[RankState]) -> list[RankState]:
        """The ranks that have not come to the exchange, or the step, that others have; none where all are as far."""
        running = [state for state in states if state.status is None and state.phase != ENDING]
        places = {(state.step, state.exchanges) for state in running}
        if len(places) < 2:
            return [state for state in running if state.stopped]
        first = min(places)
        return [state for state in running if (state.step, state.exchanges) == first]


def states_of(told: Sequence[Sequence[Any]]) -> dict[int, RankState]:
    """What `Host.watch` gives, by rank."""
    return {each[0]: RankState(*each) for each in told}


def describe(states: Sequence[RankState], hosts: Mapping[int, str]) -> str:
    """Ranks, where they run and what they do: `rank 3 (process 7 on node1, stopped) in data after step 4`."""
    named = []
    for state in states[:4]:
        stopped = ", stopped" if state.stopped else ""
        named.append(
            f"rank {state.rank} (process {state.pid} on {hosts.get(state.rank, '?')}{stopped}) {state.where()}"
        )
    more = f" and {len(states) - 4} more" if len(states) > 4 else ""
    return ", ".join(named) + more
