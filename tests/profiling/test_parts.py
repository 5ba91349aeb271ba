"""The parts of a step: they sum to it, whatever nests and whatever is left open."""

from contextlib import suppress

import pytest

from seqtrain.profiling.parts import OTHER, HostClock, Part, Timeline, hidden_seconds, seconds_by_part
from tests.profiling.profiling_cases import SetClock

OUTER, INNER, NEXT = Part("outer", "forward", 0), Part("inner"), Part("next", "backward", 0)


def at(clock, time, call, *arguments):
    clock.time = time
    return call(*arguments)


def test_nested_parts_sum_to_the_step_and_time_counts_for_the_innermost():
    clock = SetClock()
    timeline = Timeline(clock)
    timeline.start()
    at(clock, 1.0, timeline.enter, OUTER)
    at(clock, 3.0, timeline.enter, INNER)
    at(clock, 7.0, timeline.leave)
    at(clock, 8.0, timeline.switch, NEXT)
    assert timeline.now == NEXT
    at(clock, 16.0, timeline.leave)
    spans = at(clock, 17.0, timeline.stop)
    assert seconds_by_part(spans) == {OTHER: 2.0, OUTER: 3.0, INNER: 4.0, NEXT: 8.0}
    assert sum(span.seconds for span in spans) == 17.0
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]


def test_what_was_left_open_ends_with_the_part_around_it():
    clock = SetClock()
    timeline = Timeline(clock)
    timeline.start()
    with suppress(ValueError), timeline.during(OUTER):
        timeline.enter(INNER)
        clock.time = 5.0
        raise ValueError("recomputation stopped early")
    assert timeline.now == OTHER
    assert seconds_by_part(at(clock, 9.0, timeline.stop)) == {OTHER: 4.0, OUTER: 0.0, INNER: 5.0}


def test_a_timeline_can_be_started_again():
    clock = SetClock()
    timeline = Timeline(clock)
    for start in (0.0, 10.0):
        at(clock, start, timeline.start)
        spans = at(clock, start + 2.0, timeline.stop)
        assert [(span.part, span.start, span.seconds) for span in spans] == [(OTHER, start, 2.0)]


@pytest.mark.parametrize(
    ("in_flight", "waits", "hidden"),
    [
        ([(0, 4)], [], 4),
        ([(0, 4)], [(0, 4)], 0),
        ([(0, 4)], [(3, 9)], 3),
        ([(0, 4), (2, 6), (8, 9)], [(1, 3), (5, 8.5)], 0 + 1 + 2 + 0.5),
        ([(0, 4), (1, 2)], [(1, 2), (1, 3)], 2),
        ([], [(0, 1)], 0),
    ],
)
def test_what_is_in_flight_while_nobody_waits_is_hidden(in_flight, waits, hidden):
    assert hidden_seconds(in_flight, waits) == hidden


def test_the_hosts_clock_counts_from_its_making():
    clock = HostClock()
    first, second = clock.seconds([clock.mark(), clock.mark_here()])
    assert 0 <= first <= second < 60
