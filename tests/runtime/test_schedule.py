"""The learning rate at every step."""

import itertools
import math

import pytest

from seqtrain.runtime.schedule import ScheduleConfig, learning_rate

STEPS = 40


def rates(**values) -> list[float]:
    schedule = ScheduleConfig(**values)
    return [learning_rate(schedule, peak=2.0, steps=STEPS, step=step) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_rises_to_the_peak_and_falls_to_the_final_rate(name, warmup):
    found = rates(name=name, warmup_fraction=warmup / STEPS, final_lr_ratio=0.25)
    assert found[:warmup] == pytest.approx([2.0 * (step + 1) / warmup for step in range(warmup)])
    assert found[-1] == pytest.approx(0.5)
    after = found[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert max(found) <= 2.0
    assert min(found) > 0


def test_cosine_follows_the_formula():
    found = rates(name="cosine", warmup_fraction=0.1, final_lr_ratio=0.0)
    for step in range(4, STEPS):
        share = (step - 3) / (STEPS - 4)
        assert found[step] == pytest.approx(1 + math.cos(math.pi * share))


def test_wsd_is_constant_between_warm_up_and_decay():
    found = rates(name="wsd", warmup_fraction=0.125, decay_fraction=0.25, final_lr_ratio=0.0)
    assert set(found[4:30]) == {2.0}
    assert found[30:] == pytest.approx([2.0 * (9 - index) / 10 for index in range(10)])


@pytest.mark.parametrize("name", ["linear", "wsd"])
def test_a_run_that_is_all_warm_up_ends_at_the_peak(name):
    assert rates(name=name, warmup_fraction=1.0)[-1] == 2.0
