"""What is started again after a failure, how often, and where."""

from collections import Counter
from dataclasses import dataclass

# Most seconds between a failure and the next start, where several starts came no further.
LONGEST_PAUSE = 60.0
# Failures of ranks on a node after which it is left out.
FAILURES_OF_A_NODE = 2


@dataclass(frozen=True)
class Place:
    """Where a rank runs. `node`: Ray's name for the machine; empty without Ray."""

    host: str
    pid: int
    node: str


class WorkerError(RuntimeError):
    """The ranks failed, and another restart would not help; the message says how."""


@dataclass(frozen=True)
class Failure:
    """What ended a group of ranks.

    `rank`: the first that failed; -1 where none did. `error`: the kind of the error that it raised itself; empty where
    its process ended or lost the others. `step`: how many steps it had done; -1 before it began.
    """

    what: str
    rank: int = -1
    place: Place | None = None
    error: str = ""
    step: int = -1

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "the group of ranks"
        where = f" (process {self.place.pid} on {self.place.host})" if self.place else ""
        when = f" after step {self.step}" if self.step >= 0 else " before its first step"
        return f"{who}{where} {self.what}{when}"


class Restarts:
    """Counts the failures of a run, whose newest checkpoint is of step `saved`.

    `most`: how often it is started again without a new checkpoint between.
    """

    def __init__(self, most: int, *, saved: int):
        self.most = most
        self.saved = saved
        # Since the last new checkpoint.
        self.count = 0
        self._last: Failure | None = None
        self._nodes: Counter[str] = Counter()

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start: none after the first failure since a checkpoint, then ever more."""
        return min(LONGEST_PAUSE, 2.0 ** (self.count - 2)) if self.count > 1 else 0.0

    @property
    def left_out(self) -> list[str]:
        """Nodes on which ranks failed too often."""
        return sorted(node for node, failures in self._nodes.items() if node and failures >= FAILURES_OF_A_NODE)

    def add(self, failure: Failure, *, saved: int) -> str:
        """Why the run is not to be started again; empty where it is. `saved`: step of the newest checkpoint by now."""
        if saved > self.saved:
            self.saved, self.count = saved, 0
        last, self._last = self._last, failure
        if failure.place:
            self._nodes[failure.place.node] += 1
        if failure.error and last and (last.error, last.step) == (failure.error, failure.step):
            return "the same error at the same step twice, which a restart would meet again"
        if self.count >= self.most:
            return f"runtime.max_restarts={self.most} restarts without a new checkpoint between are used up"
        self.count += 1
        return ""
