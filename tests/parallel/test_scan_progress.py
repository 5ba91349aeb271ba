"""Scans under way: they advance by themselves, survive compilation and checkpointing, and fail loudly and soon."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from seqtrain.parallel import (
    all_scan,
    checkpoint_contexts,
    flush_scans,
    open_all_scan,
    scans_opened,
)
from seqtrain.parallel.halo import HaloPlan, left_halo
from seqtrain.parallel.testing import RankError, rank_outcomes, run_ranks
from tests.parallel.ranks import on_ranks
from tests.parallel.scan_cases import check, gradients_of, loss, own_leaves, random_case, start_all_scan

BIG = (1, 1, 2048, 2048)  # 16 MiB, more than sockets hold


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


# Rank 0 starts only when rank 1 has come back from starting, so starting waits for nobody. Ranks 0 and 1 wait for the
# scan only after rank 2 has its result: the scan must have advanced while they did not.
def advance(rank, algorithm):
    # Ranks meet in their first scan.
    all_scan(None, torch.ones(1, 1, 1, 1), group=dist.group.WORLD, algorithm=algorithm)
    if rank == 0:
        store().wait(["rank 1 has started"])
    blocks = 3 if algorithm == "pipeline" else None
    scan = start_all_scan(None, torch.ones(BIG), group=dist.group.WORLD, algorithm=algorithm, blocks=blocks)
    if rank == 1:
        store().set("rank 1 has started", "yes")
    if rank < 2:
        store().wait(["last rank has its state"])
    state_in, final = scan.wait()
    if rank == 2:
        store().set("last rank has its state", "yes")
    return state_in[0, 0, 0, 0].item(), final[0, 0, 1, 1].item()


@pytest.mark.all
@pytest.mark.timeout(60)
@pytest.mark.parametrize("algorithm", ["pipeline", "tree", "all_gather"])
def test_a_scan_advances_while_its_rank_computes(algorithm):
    assert run_ranks(3, advance, algorithm, limit=30) == [(0, 1), (1, 2), (2, 3)]


@on_ranks(2, limit=30)
def test_receives_are_posted_when_a_scan_is_opened(rank):
    """Rank 1 has only announced the scan, and yet rank 0's whole state leaves."""
    options = {"group": dist.group.WORLD, "algorithm": "pipeline", "blocks": 4}
    if rank == 0:
        all_scan(None, torch.ones(BIG), **options)
        flush_scans(dist.group.WORLD)
        store().set("sent", "yes")
        return
    scan = open_all_scan(None, BIG, dtype=torch.float32, device=torch.device("cpu"), **options)
    store().wait(["sent"])
    assert scan.start(None, torch.ones(BIG)).wait()[1].unique().tolist() == [2.0]


def layer(group, algorithm, transition, update, initial):
    # Something to recompute before, between and after.
    scan = start_all_scan(transition.sin(), update.cos(), group=group, initial_state=initial, algorithm=algorithm)
    local = update.exp()
    state_in, final = scan.wait()
    return (local * state_in).sum() + final.tanh().sum()


@on_ranks(3, quick=True)
def test_activation_checkpointing_repeats_no_scan(rank):
    group = dist.group.WORLD
    for algorithm in ("pipeline", "tree", "auto"):
        results = []
        for context_fn in (None, checkpoint_contexts):
            own = own_leaves(random_case("dense", 3), rank)
            run = partial(layer, group, algorithm)
            before = scans_opened(group)
            out = run(*own) if context_fn is None else checkpoint(run, *own, use_reentrant=False, context_fn=context_fn)
            out.backward()
            assert scans_opened(group) - before == 2, "one scan forward, one backward, none more"
            results.append([out.detach(), *(tensor.grad for tensor in own)])
        for plain, saved in zip(*results, strict=True):
            assert torch.equal(plain, saved)


@pytest.mark.timeout(120)
@on_ranks(2, limit=100)
def test_compiles_as_one_graph(rank):
    plain = partial(layer, dist.group.WORLD, "tree")
    results = []
    for function in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        own = own_leaves(random_case("channel", 2), rank)
        out = function(*own)
        out.backward()
        results.append([out.detach(), *(tensor.grad for tensor in own)])
    for expected, came in zip(*results, strict=True):
        torch.testing.assert_close(expected, came)


def scan_of_another_shape(rank):
    all_scan(None, torch.ones(1, 2, 3, 4 + rank), group=dist.group.WORLD, algorithm="pipeline")


def halo_of_another_size(rank):
    left_halo(torch.ones(1, 2, 3), HaloPlan((0, 1 - rank), (0, 2, 4)), group=dist.group.WORLD)


@pytest.mark.all
@pytest.mark.parametrize(
    ("exchange", "messages"),
    [
        (scan_of_another_shape, ["ranks disagree about the scan"]),
        (halo_of_another_size, ["messages failed on rank 1 of 2", "disagree about what is sent"]),
    ],
)
def test_ranks_that_disagree_get_an_error(exchange, messages):
    """gloo aborts the process when a message has another size than its receive; here it is an error to catch."""

    def disagree(rank):
        exchange(rank)
        flush_scans(dist.group.WORLD)

    outcomes = rank_outcomes(2, disagree, limit=30, group_timeout=2)
    assert all(message in str(outcomes[1]) for message in messages), outcomes[1]


# A rank that raises or is killed ends its neighbors' scans and messages long before the group's time-out.
def one_leaves(rank, way):
    update = torch.ones(1, 1, 8, 8)
    all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline")
    if rank == 1 and way == "raise":
        raise KeyError("own error")
    if rank == 1:
        os.kill(os.getpid(), 9)
    # Longer than sends may be outstanding, so that the ranks before it notice as well as those after it.
    for _ in range(20):
        left_halo(update[0], HaloPlan((0, 7, 15, 23), (0, 8, 16, 24, 32)), group=dist.group.WORLD)
        all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline")


@pytest.mark.all
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("way", "message"), [("raise", "own error"), ("kill", "died without a word")])
def test_a_lost_rank_ends_the_others(way, message):
    outcomes = rank_outcomes(4, one_leaves, way, limit=30, group_timeout=1000)
    assert message in str(outcomes[1])
    for rank in (0, 2, 3):
        assert isinstance(outcomes[rank], RankError), f"rank {rank} came to no end of its own: {outcomes[rank]}"
        assert any(said in str(outcomes[rank]) for said in ("all_scan failed", "messages failed", "dead since"))


@pytest.mark.all
def test_groups_may_be_destroyed_and_made_again(tmp_path):
    """An engine belongs to its group: the next group of the same name starts afresh."""

    def renewed(rank):
        for turn in range(3):
            case = random_case("head", 2, seed=turn)
            transition, update, initial = own = own_leaves(case, rank)
            states = all_scan(transition, update, group=dist.group.WORLD, initial_state=initial, algorithm="auto")
            loss(case.weights[rank], *states).backward()
            check(case, rank, states, gradients_of(*own), 1e-12, f"turn {turn}")
            flush_scans(dist.group.WORLD)
            dist.barrier()
            dist.destroy_process_group()
            renewal = dist.FileStore(f"{tmp_path}/{turn}", 2)
            dist.init_process_group("gloo", store=renewal, rank=rank, world_size=2)

    run_ranks(2, renewed)
