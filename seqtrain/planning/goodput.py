"""What failures cost a run: the share of its time that trains (goodput), and how often it should save."""

import math
from dataclasses import dataclass

from seqtrain.runtime.cadence import optimal_interval


@dataclass(frozen=True)
class Failures:
    """How often a run fails, and what that costs, in seconds.

    `between`: from one failure of any rank to the next, the mean. `save`: that training stands still for a checkpoint.
    `restart`: from a failure to the first step after it, its detection included.
    """

    between: float
    save: float
    restart: float


@dataclass(frozen=True)
class Goodput:
    """Shares of a run's time: what trains, saves, is done again after failures, and is spent on starting again."""

    interval: float
    trains: float
    saves: float
    again: float
    restarts: float

    def __str__(self) -> str:
        return (
            f"{self.trains:.1%} of the time trains, {self.saves:.1%} saves, {self.again:.1%} is done again, "
            f"{self.restarts:.1%} starts again"
        )


def goodput(failures: Failures, interval: float = 0.0) -> Goodput:
    """The shares where a checkpoint is made every `interval` seconds of training; 0: as often as loses the least.

    Failures are a Poisson process, which goes on while ranks start again: a part of a run takes
    `M exp(R/M) (exp((t + d)/M) - 1)` seconds, M between failures, R a restart, t the interval, d a save: Daly (2006),
    equation 13.
    """
    mean = failures.between
    interval = interval or max(optimal_interval(failures.save, mean), 1.0)
    part = interval + failures.save
    # Failures in a part until it is done, and while its restarts are.
    failed = math.expm1(part / mean)
    again = mean * failed - part
    restarts = failed * mean * math.expm1(failures.restart / mean)
    whole = part + again + restarts
    return Goodput(interval, interval / whole, failures.save / whole, again / whole, restarts / whole)


def describe_failures(ranks: int, *, rank_hours: float, failures: Failures) -> str:
    """A line on what failures cost, with the key that saves as often as is best."""
    found = goodput(failures)
    often = f"one in {failures.between / 3600:.3g} h of {ranks:,} ranks ({rank_hours:,.0f} rank hours each)"
    return f"failures: {often}; with checkpoint.minutes={found.interval / 60:.3g}, {found}"
