"""When a run saves by the clock: every so many minutes, or as often as the cost of a save and failures make best."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.runtime.settings import CheckpointConfig, PretrainConfig
from seqtrain.validation import AUTO

# Hours between failures of one rank (Meta's research clusters: 7.9 hours with 1,024 GPUs, arXiv 2410.21680), and at
# most of all together: of what else ends a run.
RANK_HOURS, MOST_HOURS = 8000.0, 24.0
# After so long the first save is made, whose cost is measured.
FIRST_SECONDS = 300.0


def optimal_interval(cost: float, between_failures: float) -> float:
    """Seconds of training between two saves that lose the least: to them, and to what is done again after failures.

    `cost`: seconds that training stands still for a save. `between_failures`: seconds, the mean. Young (1974) has
    sqrt(2 cost between_failures); these are the terms of higher order with it: Daly (2006), equation 37.
    """
    if cost >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(cost / (2 * between_failures))
    return math.sqrt(2 * cost * between_failures) * (1 + ratio / 3 + ratio**2 / 9) - cost


@dataclass
class SaveClock:
    """Says on rank 0 when the next save is due; the others are told."""

    config: CheckpointConfig
    # Seconds between two failures, as they are assumed to be.
    assumed: float
    # Restarts of this session's ranks by a failure, and seconds since 1970 of their first start.
    failures: int = 0
    first_start: float = field(default_factory=time.time)
    now: Callable[[], float] = time.monotonic
    # Whether the last save is still being written, for which another would wait.
    busy: Callable[[], bool] = lambda: False
    # Seconds that training stood still for the last save; None before the first.
    cost: float | None = None

    def __post_init__(self) -> None:
        self._last = self.now()

    def due(self) -> bool:
        """Whether it is time for a save."""
        return self.config.minutes != 0 and self.now() - self._last >= self.interval() and not self.busy()

    def interval(self) -> float:
        """Seconds between two saves."""
        if self.config.minutes != AUTO:
            return 60 * float(self.config.minutes)
        if self.cost is None:
            return FIRST_SECONDS
        return optimal_interval(self.cost, self.between_failures())

    def between_failures(self) -> float:
        """Seconds, the mean: what is assumed counts as one failure seen, and gives way to what is seen."""
        return (self.assumed + max(0.0, time.time() - self.first_start)) / (1 + self.failures)

    def saved(self, seconds: float) -> None:
        """To be told of every save and how long training stood still for it."""
        self.cost, self._last = seconds, self.now()


def save_clock(config: PretrainConfig, folder: RunFolder, session: str) -> SaveClock:
    """A clock for ranks that have noted their start in `folder`, as their session's starts before tell of failures."""
    assumed = config.checkpoint.mtbf_hours
    if assumed == AUTO:
        assumed = min(MOST_HOURS, RANK_HOURS / config.parallel.ranks)
    own = [start["time"] for start in read_lines(folder.starts) if start["session"] == session]
    return SaveClock(
        config.checkpoint, 3600 * assumed, failures=max(0, len(own) - 1), first_start=min(own, default=time.time())
    )
