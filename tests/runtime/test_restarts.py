"""What is started again after a failure: how often, where, and what is left to the user."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from seqtrain.runtime import ranks, run
from seqtrain.runtime.restarts import Failure, Place, Restarts, WorkerError
from seqtrain.runtime.task import Callback
from tests.runtime.runtime_cases import change, folder_of, losses, on_ranks, small_config, train_on

BUG = Failure("failed: ValueError: x", 0, Place("a", 1, "n"), "ValueError", 5)
DEATH = Failure("ended without a word", 1, Place("b", 2, "m"), "", 5)


@pytest.mark.parametrize(
    ("failures", "given_up"),
    [
        # Each with the step of the newest checkpoint by then.
        ([(DEATH, 4)] * 3, ""),
        ([(DEATH, 4)] * 4, "runtime.max_restarts=3"),
        ([(replace(DEATH, step=step), step - 1) for step in range(5, 50, 5)], ""),
        ([(BUG, 4), (BUG, 4)], "same error at the same step twice"),
        ([(BUG, 4), (replace(BUG, step=6), 4)], ""),
        ([(BUG, 4), (replace(BUG, error="OSError"), 4)], ""),
        ([(BUG, 4), (DEATH, 4), (BUG, 4)], ""),
    ],
)
def test_what_ends_a_run(failures, given_up):
    restarts = Restarts(3, saved=4)
    *before, last = [restarts.add(failure, saved=saved) for failure, saved in failures]
    assert set(before) <= {""}
    assert given_up in last
    assert bool(last) == bool(given_up)


def test_starts_that_come_no_further_wait_ever_longer():
    restarts = Restarts(20, saved=0)
    pauses = [restarts.add(DEATH, saved=0) or restarts.pause for _ in range(9)]
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    restarts.add(DEATH, saved=1)
    assert restarts.pause == 0


def test_a_node_is_left_out_when_it_has_failed_twice():
    restarts = Restarts(9, saved=0)
    for failure in (DEATH, BUG, Failure("lost"), replace(DEATH, place=Place("b", 9, ""))):
        restarts.add(failure, saved=0)
    assert restarts.left_out == []
    restarts.add(replace(DEATH, rank=3), saved=0)
    assert restarts.left_out == ["m"]


def test_a_rank_that_computes_wrong_numbers_does_not_join(monkeypatch):
    def wrong(_):
        multiply = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: multiply(a, b) + (torch.rand(a.shape) < 1e-5))

    def check(group, faulty):
        torch.manual_seed(0)
        if group.rank == faulty:
            wrong(group)
        ranks.check_health(group)

    on_ranks(1, check, 7)
    with pytest.raises(RuntimeError, match="a product of matrices sums to"):
        on_ranks(1, check, 0)


class Dying(Callback):
    """Ends rank 1, or raises in it, in the steps `at`, each time that it comes to one that is not in `marks` yet."""

    def __init__(self, marks, at, *, raises=False):
        self.marks, self.at, self.raises = marks, at, raises

    def begin(self, state):
        self.state = state

    def phase(self, name):
        state = self.state
        mark = self.marks / f"{state.progress.step}"
        if name == "step" and state.ranks.rank == 1 and state.progress.step in self.at:
            if self.raises:
                raise ZeroDivisionError("each time")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().phase(name)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_six_deaths_with_progress_between_are_survived(tmp_path):
    sizes = {"train": {"steps": 14}, "parallel": {"data": 2}, "checkpoint": {"every": 2}}
    config = small_config(tmp_path, runtime={"name": "ray", "max_restarts": 1}, **sizes)
    undisturbed = change(config, "undisturbed", runtime={"name": "inline"})
    train_on(undisturbed)
    summary = run(config, callback=Dying(tmp_path, {3, 5, 7, 9, 11, 13}))
    assert summary["restarts"] == 6
    assert losses(config) == losses(undisturbed)
    log = folder_of(config).log.read_text()
    told = [line for line in log.splitlines() if "was ended by SIGKILL" in line]
    assert len(told) == 6
    assert all("WARNING seqtrain.runtime: rank 1 (process " in line and "goes on from step" in line for line in told), (
        told
    )
    # A start tells where its time went, if it lives to be seen with a step done.
    assert "s in all" in log


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_same_fault_twice_is_one_line(tmp_path):
    config = small_config(tmp_path, runtime={"name": "ray"}, parallel={"data": 2}, checkpoint={"every": 2})
    with pytest.raises(
        WorkerError, match=r"^rank 1 \(process .*ZeroDivisionError: each time after step 3; the same error"
    ):
        run(config, callback=Dying(tmp_path, {3}, raises=True))
    assert len(folder_of(config).starts.read_text().splitlines()) == 2
