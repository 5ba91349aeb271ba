"""What is said of a run where there is no terminal to draw a bar on."""

import io

import pytest
from rich.console import Console

from seqtrain.runtime import progress
from seqtrain.runtime.metrics import Within
from seqtrain.runtime.progress import ProgressDisplay


@pytest.fixture
def shown(monkeypatch):
    """A display of three steps that says everything, and what it has said."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    text = io.StringIO()
    with ProgressDisplay(steps=3, console=Console(file=text, width=200)) as display:
        yield display, lambda: text.getvalue().splitlines()


def record(step):
    return {"step": step, "loss": 2.0, "tokens_per_second": 1000.0, "step_seconds": 7.0}


def test_a_step_says_how_much_of_it_is_done_each_time_there_is_more(shown):
    display, lines = shown
    for done in (1, 1, 2):
        display.show_within(Within(0, done, 4))
    display.show(record(1))
    display.show_within(Within(0, 4, 4))
    display.show_within(Within(1, 1, 4))
    assert lines() == [
        "part 1/4 of step 1  starting",
        "part 2/4 of step 1  starting",
        "step 1/3  loss 2.0000  1,000 tokens/s  14 s left",
        "part 1/4 of step 2  loss 2.0000  1,000 tokens/s",
    ]
