"""One line a step in `metrics.jsonl`, readers that follow it, and what is said of a run without a terminal."""

import io
import json
import threading

import pytest
from rich.console import Console

from seqtrain.errors import FencedError
from seqtrain.runtime import progress
from seqtrain.runtime.lease import Lease, take
from seqtrain.runtime.metrics import MetricsFile, MetricsReader, Within, count_restarts
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.run_folder import RunFolder, read_lines


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def write(folder: RunFolder, *, after: int, steps: range, session: str = "a") -> None:
    """What rank 0 does from a start at step `after`."""
    file = MetricsFile(folder.metrics, take(folder.epochs, "a", seconds=0.1), step=after)
    with folder.starts.open("a") as starts:
        starts.write(json.dumps({"session": session, "step": after}) + "\n")
    for step in steps:
        file.write({"step": step, "loss": float(step), "session": session})
    file.close()


def test_steps_after_the_checkpoint_are_cut_off_and_done_again(folder):
    write(folder, after=0, steps=range(1, 8))
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 8, "lo')
    write(folder, after=5, steps=range(6, 10), session="b")
    records = read_lines(folder.metrics)
    assert steps(records) == list(range(1, 10))
    assert [record["session"] for record in records] == ["a"] * 5 + ["b"] * 4


def test_a_number_that_json_has_not_becomes_null(folder):
    file = MetricsFile(folder.metrics, take(folder.epochs, "a", seconds=0.1), step=0)
    file.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    file.close()
    assert folder.metrics.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.1}\n'


def test_whoever_writes_a_line_does_not_wait_for_the_file_system(folder, monkeypatch):
    lease, stands_still = take(folder.epochs, "a", seconds=0.1), threading.Event()
    file = MetricsFile(folder.metrics, lease, step=0)
    monkeypatch.setattr(Lease, "check", lambda lease: stands_still.wait(20))
    for step in (1, 2, 3):
        file.write({"step": step})
    assert folder.metrics.read_bytes() == b""
    threading.Timer(0.1, stands_still.set).start()
    file.flush()
    assert steps(read_lines(folder.metrics)) == [1, 2, 3]

    def refuse(lease):
        raise FencedError("another start")

    monkeypatch.setattr(Lease, "check", refuse)
    file.write({"step": 4})
    with pytest.raises(FencedError):
        file.flush()
    with pytest.raises(FencedError):
        file.write({"step": 5})
    with pytest.raises(FencedError):
        file.close()
    assert steps(read_lines(folder.metrics)) == [1, 2, 3]


def steps(records) -> list[int]:
    return [record["step"] for record in records]


def test_a_reader_sees_each_step_once_and_repeated_steps_again(folder):
    write(folder, after=0, steps=range(1, 4))
    reader = MetricsReader(folder, take(folder.epochs, "a", seconds=0.1))
    assert list(reader.new()) == [], "what was there before is not new"
    write(folder, after=3, steps=range(4, 7))
    assert steps(reader.new()) == [4, 5, 6]
    # Between two looks the file is cut back and grows beyond its old size.
    write(folder, after=2, steps=range(3, 12))
    assert steps(reader.new()) == list(range(3, 12))
    assert list(reader.new()) == []


def test_a_reader_waits_for_the_end_of_a_line(folder):
    reader = MetricsReader(folder, take(folder.epochs, "a", seconds=0.1))
    for piece, found in ((b"", []), (b'{"step": 1}\n{"st', [1]), (b'ep": 2}\n', [2])):
        with folder.metrics.open("ab") as file:
            file.write(piece)
        assert steps(reader.new()) == found


def test_restarts_are_starts_that_nobody_asked_for(folder):
    assert count_restarts(folder) == 0
    write(folder, after=0, steps=range(1, 2), session="first call")
    assert count_restarts(folder) == 0
    write(folder, after=0, steps=range(1, 2), session="first call")
    write(folder, after=1, steps=range(2, 3), session="second call")
    assert count_restarts(folder) == 1


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
    for done in (1, 1, 2):
        display.show_within(Within(1, done, 2, evaluation=True))
    display.show_within(Within(1, 1, 4))
    assert lines() == [
        "segment 1/4 of step 1  starting",
        "segment 2/4 of step 1  starting",
        "step 1/3  loss 2.0000  1,000 tokens/s  14 s left",
        "evaluation 1/2 after step 1  loss 2.0000  1,000 tokens/s",
        "evaluation 2/2 after step 1  loss 2.0000  1,000 tokens/s",
        "segment 1/4 of step 2  loss 2.0000  1,000 tokens/s",
    ]
