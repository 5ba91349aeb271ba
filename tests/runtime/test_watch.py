"""Which rank hangs: told from what each says of itself, without any of them."""

import pytest

from seqtrain.runtime.pulse import PHASES, STARTING
from seqtrain.runtime.watch import RankState, Watch, describe

HOSTS = {0: "a", 1: "b"}


def state(rank, step=0, *, exchanges=0, phase="step", stopped=False):
    return RankState(rank, 100 + rank, None, stopped, "", 1, exchanges, step, PHASES.index(phase), 0)


def look_for(watch, seconds, *states, since=0.0):
    """Looks each second; the seconds after which ranks are blamed, and which; those that were named before."""
    named = []
    for second in range(int(seconds) + 1):
        watch.look(states, since + second)
        named += [each.rank for each in watch.slow(states)]
        if hung := watch.hung(states):
            return second, [each.rank for each in hung], named
    return None, [], named


def trained(steps=5, seconds=2.0):
    """A watch that has seen some steps, and when it looked last."""
    watch = Watch(step_seconds=0, section_seconds=900)
    for step in range(steps + 1):
        watch.look([state(0, step), state(1, step)], step * seconds)
    return watch, steps * seconds


def test_the_rank_that_did_not_come_to_an_exchange_is_blamed():
    watch, now = trained()
    states = state(0, 5, exchanges=3), state(1, 5, exchanges=2, phase="data")
    after, blamed, named = look_for(watch, 300, *states, since=now)
    assert (blamed, named) == ([1], [1])
    assert 60 <= after <= 120
    assert describe(states[1:], HOSTS) == "rank 1 (process 101 on b) in data after step 5"


def test_the_limit_of_a_step_follows_the_steps_measured():
    states = [state(0, 5), state(1, 5)]
    assert trained(seconds=2.0)[0].limit(states) == 60
    slow = Watch(step_seconds=0, section_seconds=900)
    for second in range(240):
        slow.look([state(0, second // 40), state(1, second // 40)], second)
    assert slow.limit(states) == pytest.approx(5 * 40)
    own = Watch(step_seconds=7, section_seconds=900)
    for step in range(3):
        own.look([state(0, step), state(1, step)], step)
    assert own.limit(states) == 7


@pytest.mark.parametrize("phase", [STARTING, "checkpoint", "evaluation"])
def test_what_takes_long_has_a_limit_of_its_own(phase):
    watch, now = trained()
    states = state(0, 5, phase=phase), state(1, 5, exchanges=1)
    assert look_for(watch, 800, *states, since=now)[1] == []
    assert look_for(watch, 800, *states, since=now + 801)[1] == [0]


def test_the_first_step_may_take_long():
    watch = Watch(step_seconds=0, section_seconds=900)
    assert look_for(watch, 800, state(0, 0), state(1, 0))[1] == []


def test_a_stopped_process_is_blamed_soon_unless_all_are():
    watch, now = trained()
    after, blamed, _ = look_for(watch, 100, state(0, 5), state(1, 5, stopped=True), since=now)
    assert blamed == [1]
    assert after <= 25
    watch, now = trained()
    assert look_for(watch, 500, state(0, 5, stopped=True), state(1, 5, stopped=True), since=now)[1] == []


def test_a_watch_that_was_stopped_itself_blames_nobody():
    watch, now = trained()
    states = [state(0, 5), state(1, 5)]
    watch.look(states, now)
    watch.look(states, now + 3600)
    assert watch.hung(states) == []


def test_progress_anywhere_is_progress():
    watch, now = trained()
    for second in range(300):
        states = [state(0, 5, exchanges=second // 20), state(1, 5)]
        watch.look(states, now + second)
        assert watch.hung(states) == []
