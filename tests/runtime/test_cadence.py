"""When a run saves by the clock, and which checkpoints stay."""

import math

import pytest

from seqtrain.errors import ConfigError
from seqtrain.runtime import cadence
from seqtrain.runtime.cadence import SaveClock, optimal_interval, save_clock
from seqtrain.runtime.settings import CheckpointConfig
from seqtrain.validation import validate
from tests.runtime.runtime_cases import change, folder_of, losses, small_config, train_on


@pytest.mark.parametrize(("cost", "between"), [(0.1, 3600.0), (10.0, 3600.0), (600.0, 3600.0)])
def test_no_other_interval_loses_less(cost, between):
    def time_for_a_second(interval: float) -> float:
        """Expected, with failures at random moments, also in saves (Daly 2006, equation 20, but for the restart)."""
        return between * math.expm1((interval + cost) / between) / interval

    best = optimal_interval(cost, between)
    least = min(time_for_a_second(best * factor / 100) for factor in range(10, 1000))
    assert time_for_a_second(best) - 1 < 1.01 * (least - 1)


def test_the_clock_goes_by_minutes_or_by_what_a_save_costs_and_failures_seen(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cadence.time, "time", lambda: 1e9 + now[0])
    for minutes, seconds in ((0.0, math.inf), (2.0, 120.0), ("auto", cadence.FIRST_SECONDS)):
        now[0] = 0.0
        clock = SaveClock(CheckpointConfig(minutes=minutes), 3600.0, first_start=1e9, now=lambda: now[0])
        now[0] = min(seconds, 1e6) - 1
        assert not clock.due(), minutes
        now[0] += 1
        assert clock.due() == (seconds < math.inf), minutes
        clock.busy = lambda: True
        assert not clock.due(), "the last save is still being written"
        clock.busy = lambda: False
        clock.saved(10.0)
        assert not clock.due()
    assert clock.interval() == optimal_interval(10.0, 3600.0 + now[0])
    clock.failures = 3
    assert clock.interval() == optimal_interval(10.0, (3600.0 + now[0]) / 4)
    config = small_config(tmp_path, parallel={"data": 1000})
    folder_of(config).path.mkdir()
    starts = [
        f'{{"session": "{name}", "step": 0, "time": {second}}}\n' for name, second in (("a", 5), ("b", 6), ("b", 9))
    ]
    folder_of(config).starts.write_text("".join(starts))
    clock = save_clock(config, folder_of(config), "b")
    assert (clock.failures, clock.first_start, clock.assumed) == (1, 6, 8 * 3600)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minutes": -1}, "checkpoint.minutes=-1: must be greater than or equal to 0"),
        ({"minutes": "often"}, "checkpoint.minutes=often: "),
        ({"mtbf_hours": 0}, "checkpoint.mtbf_hours=0: must be greater than 0"),
        ({"keep_every": 1.5}, "checkpoint.keep_every=1.5: "),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(CheckpointConfig, values, prefix="checkpoint.")


@pytest.mark.all
def test_ranks_save_at_the_same_steps_and_the_chosen_ones_stay(tmp_path, monkeypatch):
    """Rank 0's clock alone decides; all else would leave a rank waiting."""
    config = small_config(tmp_path, parallel={"data": 2}, checkpoint={"every": 0})
    steps = iter([0, 0, 1, 0, 1, 0])
    monkeypatch.setattr(SaveClock, "due", lambda clock: bool(clock.config.minutes and next(steps)))
    saved = change(config, "saved", checkpoint={"every": 0, "keep_every": 4, "minutes": 1.0})
    train_on(change(config, "plain", checkpoint={"every": 3}), saved)
    assert losses(saved) == losses(change(config, "plain"))
    kept = sorted(path.name for path in folder_of(saved).checkpoints.iterdir())
    assert kept == [f"step-0000000{step}" for step in (4, 5, 6)], "3 was dropped, 5 by the clock"
