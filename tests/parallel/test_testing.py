"""The launcher of forked ranks: results in order, the first failure first, nothing left behind."""

import os
import pickle
import threading
import time

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel.testing import RankError, rank_outcomes, run_ranks


def test_results_come_in_the_order_of_ranks():
    def summed(rank, factor):
        time.sleep(0.05 * (3 - rank))
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        return factor * rank, total.item()

    assert run_ranks(3, summed, 10) == [(0, 3.0), (10, 3.0), (20, 3.0)]


@pytest.mark.all
def test_the_first_failure_is_raised_and_ends_the_others():
    def fail(rank):
        if rank == 1:
            raise KeyError("lost")
        threading.Event().wait()

    with pytest.raises(RankError, match="KeyError: 'lost'") as caught:
        run_ranks(3, fail, limit=20)
    assert caught.value.rank == 1
    assert isinstance(caught.value.error, KeyError)


@pytest.mark.all
def test_an_error_that_cannot_be_sent_is_still_told():
    class Local(Exception):
        pass

    def fail(rank):
        raise Local("only here")

    with pytest.raises(RankError, match="Local: only here") as caught:
        run_ranks(1, fail)
    assert caught.value.error is None


@pytest.mark.all
def test_a_hang_and_a_death_are_told_apart():
    with pytest.raises(RankError, match="did not end within 1 s"):
        run_ranks(2, lambda rank: rank and threading.Event().wait(), limit=1)
    outcomes = rank_outcomes(2, lambda rank: os._exit(7) if rank else "alive", limit=20)
    assert outcomes[0] == "alive"
    assert "died without a word" in str(outcomes[1])


# The parent has used all its threads, and autograd, before it forks.
@pytest.mark.all
def test_ranks_compute_after_the_parent_has():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.ones(600, 600, requires_grad=True)
        (big @ big).sum().backward()

        def compute(rank):
            weight = torch.ones(600, 600, requires_grad=True)
            (weight @ weight).sum().backward()
            return torch.get_num_threads(), weight.grad[0, 0].item()

        assert run_ranks(2, compute, limit=30) == [(1, 1200.0)] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_what_went_wrong_can_be_told_to_another_process():
    error = RankError(3, "out of memory", ValueError("no room"))
    came = pickle.loads(pickle.dumps(error))
    assert (str(came), came.rank, repr(came.error)) == (str(error), 3, repr(error.error))
