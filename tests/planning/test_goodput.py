"""What failures cost, in closed form, against a simulation that knows no formula."""

import random

import pytest

from seqtrain.planning.goodput import Failures, describe_failures, goodput
from seqtrain.runtime.cadence import optimal_interval


def simulated(failures: Failures, interval: float, parts: int) -> dict[str, float]:
    """Shares of the time of so many parts of a run, failure by failure."""
    chance = random.Random(0)
    spent = dict.fromkeys(("trains", "saves", "again", "restarts"), 0.0)
    until = chance.expovariate(1 / failures.between)
    for _ in range(parts):
        while until < interval + failures.save:
            spent["again"] += until
            until = chance.expovariate(1 / failures.between)
            while until < failures.restart:
                spent["restarts"] += until
                until = chance.expovariate(1 / failures.between)
            spent["restarts"] += failures.restart
            until -= failures.restart
        until -= interval + failures.save
        spent["trains"] += interval
        spent["saves"] += failures.save
    whole = sum(spent.values())
    return {name: seconds / whole for name, seconds in spent.items()}


@pytest.mark.parametrize(
    ("failures", "interval"),
    [
        (Failures(3600.0, 30.0, 300.0), 600.0),
        (Failures(600.0, 60.0, 200.0), 300.0),
        (Failures(28_440.0, 700.0, 2880.0), 6300.0),
    ],
)
def test_the_closed_form_is_what_a_simulation_finds(failures, interval):
    found, expected = goodput(failures, interval), simulated(failures, interval, parts=60_000)
    assert sum(expected.values()) == pytest.approx(1)
    for name, share in expected.items():
        assert getattr(found, name) == pytest.approx(share, rel=0.02), name


def test_the_best_interval_is_young_s_and_daly_s():
    failures = Failures(28_440.0, 10.0, 180.0)
    best = goodput(failures)
    assert best.interval == pytest.approx(optimal_interval(10.0, 28_440.0))
    assert all(goodput(failures, factor * best.interval).trains < best.trains for factor in (0.5, 0.8, 1.25, 2))
    # For rare failures: a save an interval, half an interval a failure, and the restart.
    small = 10 / best.interval + best.interval / 2 / 28_440 + 180 / 28_440
    assert 1 - best.trains == pytest.approx(small, rel=0.05)


def test_what_is_said_names_the_key():
    said = describe_failures(1024, rank_hours=8000, failures=Failures(28_125.0, 10.0, 180.0))
    assert said.startswith(
        "failures: one in 7.81 h of 1,024 ranks (8,000 rank hours each); with checkpoint.minutes=12."
    )
    assert "of the time trains" in said
