"""What lies left of a rank: rows of earlier ranks in order, their gradients back at their owners, past inputs."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from seqtrain.kernels import short_convolution
from seqtrain.parallel import ShardedSequence, all_scan, flush_scans
from seqtrain.parallel.exchange import EXCHANGES_IN_FLIGHT, exchange
from seqtrain.parallel.halo import HaloPlan, left_halo, past_inputs
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import boundaries
from tests.parallel.ranks import on_ranks
from tests.parallel.scan_cases import start_all_scan

TOKENS = 19
OFFSETS = {
    2: [(0, 9, 19), (0, 0, 19), (0, 19, 19)],
    3: [(0, 7, 13, 19), (0, 1, 2, 19), (0, 5, 5, 19), (0, 18, 19, 19), (0, 0, 0, 19)],
    4: [(0, 4, 5, 12, 19), (0, 0, 2, 2, 19), (0, 1, 2, 3, 19)],
}
# The row alone; a document over several ranks; starts at cuts, one document empty; shorter than any filter.
DOCUMENTS = {"whole": None, "long": [2, 15, 2], "at cuts": [5, 2, 0, 5, 7], "short": [1, 2, 1, 1, 3, 1, 2, 4, 1, 1, 2]}


def expected_positions(offsets, documents, rank, count):
    """Positions before the rank's first token, token by token."""
    document_of = [n for n, length in enumerate(documents or [TOKENS]) for _ in range(length)]
    start, end = offsets[rank : rank + 2]
    own = document_of[start] if end > start else document_of[start - 1] if start else document_of[0]
    return [p for p in range(max(start - count, 0), start) if document_of[p] == own]


def sharded(offsets, cu_seqlens=None):
    return ShardedSequence(group=dist.group.WORLD, offsets=offsets, cu_seqlens=cu_seqlens)


def rows_and_gradients(rank, ranks):
    group = dist.group.WORLD
    x = torch.randn(1, TOKENS, 2, 3, dtype=torch.float64)
    dist.broadcast(x, 0)
    for offsets, documents, count in product(OFFSETS[ranks], DOCUMENTS.values(), (0, 1, 3, 8, 30)):
        row = sharded(offsets, None if documents is None else boundaries(documents))
        own = x[:, offsets[rank] : offsets[rank + 1]].clone().requires_grad_()
        halo = left_halo(own, row.before(count), group=group)
        wanted = [expected_positions(offsets, documents, r, count) for r in range(ranks)]
        assert torch.equal(halo, x[:, wanted[rank]]), f"{offsets} {documents} {count} on rank {rank}"
        # Rank r weighs its halo by r + 1: a token's gradient names the ranks that have seen it.
        ((rank + 1) * halo.sum() + 0 * own.sum()).backward()
        for index, position in enumerate(range(*offsets[rank : rank + 2])):
            seen = sum(r + 1 for r in range(ranks) if position in wanted[r])
            assert own.grad[0, index].unique().tolist() == [seen]


# Ranks with 0 and 1 tokens, and with fewer than are wanted, so that a halo spans ranks.
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.all), 3, pytest.param(4, marks=pytest.mark.all)])
def test_rows_come_in_order_and_gradients_go_home(ranks):
    run_ranks(ranks, rows_and_gradients, ranks)


@on_ranks(3)
def test_states_after_each_rank(rank):
    """A rank without tokens has the state of the one before."""
    group, offsets = dist.group.WORLD, (0, 4, 4, 9)
    own = torch.arange(9.0)[None, offsets[rank] : offsets[rank + 1], None]
    sequence = ShardedSequence(group=group, offsets=offsets, cu_seqlens=boundaries([2, 5, 2]))
    assert past_inputs(own, 3, sequence)[0, :, 0].tolist() == [[0, 0, 0], [0, 2, 3], [0, 2, 3]][rank]
    _, state = sequence.run(short_convolution, own, torch.ones(1, 4))
    assert state[0, :, 0].tolist() == [[0, 2, 3], [0, 2, 3], [0, 7, 8]][rank]


@on_ranks(4)
def test_groups_that_are_not_the_world(rank):
    """Ranks of the group are not ranks of the world, and both groups talk at once."""
    odd, even = dist.new_group([1, 3]), dist.new_group([0, 2])
    own = torch.full((1, 2, 1), float(rank), requires_grad=True)
    halo = left_halo(own, HaloPlan((0, 1), (0, 2, 4)), group=odd if rank % 2 else even)
    halo.sum().backward()
    assert halo.flatten().tolist() == ([rank - 2] if rank > 1 else [])
    assert own.grad.flatten().tolist() == ([0, 0] if rank > 1 else [0, 1])


@on_ranks(3, limit=30)
def test_scans_and_halos_share_a_group(rank):
    """Scans on the same group, running on their own thread, take no message of a halo for theirs."""
    group, row = dist.group.WORLD, sharded((0, 4, 8, 12))
    x = torch.full((1, 4, 6), float(rank), requires_grad=True)
    loss = 0
    for turn in range(12):
        scan = start_all_scan(None, x[:, :1, None] * turn, group=group, algorithm="tree")
        # The same number of floats as a state.
        halo = left_halo(x * turn, row.before(1), group=group)
        state_in, _ = scan.wait()
        assert halo.unique().tolist() == ([float((rank - 1) * turn)] if rank else [])
        assert state_in.unique().tolist() == [float(sum(range(rank)) * turn)]
        loss = loss + halo.sum() + state_in.sum()
    loss.backward()
    total, after = float(sum(range(12))), 2 - rank
    assert x.grad[0, 0].tolist() == [total * after] * 6
    assert x.grad[0, 3].tolist() == [total * (after > 0)] * 6


@on_ranks(2, limit=30)
def test_a_rank_runs_ahead_of_those_it_sends_to(rank):
    """It may be far ahead of one that only receives from it; what it sends, 16 MiB in all, fits in no socket."""
    store = dist.distributed_c10d._get_default_store()
    x = torch.zeros(1 << 18)
    sizes, none = [0, x.numel()], [0, 0]
    if rank == 1:
        store.wait(["rank 0 is ahead"])
    for turn in range(EXCHANGES_IN_FLIGHT):
        mine = (x, sizes, none) if rank == 0 else (x[:0], none, [x.numel(), 0])
        came = exchange(*mine, group=dist.group.WORLD, agreed="ahead", run_ahead=True)
        assert rank == 0 or came.unique().tolist() == [turn]
        x.fill_(turn + 1)  # what is under way was copied
    if rank == 0:
        store.set("rank 0 is ahead", "yes")
    flush_scans(dist.group.WORLD)


@on_ranks(2, limit=30)
def test_both_ranks_send_at_once(rank):
    """gloo's `send` against `send` would wait for ever: 16 MiB fit in no socket."""
    numbers = 1 << 22
    sizes = [numbers * (peer != rank) for peer in range(2)]
    came = exchange(torch.full((numbers,), float(rank)), sizes, sizes, group=dist.group.WORLD, agreed="both")
    assert came.unique().tolist() == [1 - rank]


@on_ranks(2, limit=30)
def test_inputs_may_be_strided_on_one_rank(rank):
    """gloo rejects a strided tensor on the rank that has it, and the others die by time-out."""
    x = torch.arange(12.0).view(1, 4, 3)
    x = x.mT.contiguous().mT if rank == 0 else x
    assert x.is_contiguous() == bool(rank)
    halo = left_halo(x, HaloPlan((0, 2), (0, 4, 8)), group=dist.group.WORLD)
    assert halo.flatten().tolist() == ([*range(6, 12)] if rank else [])


@on_ranks(2, limit=30, group_timeout=1)
def test_a_group_is_dead_after_a_message_failed(rank):
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.wait(["it is dead"])
        return
    x, plan = torch.ones(1, 2, 3), HaloPlan((0, 0), (0, 2, 4))
    for message in ("messages failed on rank 1 of 2", "dead since"):
        with pytest.raises(RuntimeError, match=message):
            left_halo(x, plan, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="dead since"):
        all_scan(None, torch.ones(1, 1, 2, 2), group=dist.group.WORLD, algorithm="tree")
    store.set("it is dead", "yes")


@on_ranks(2)
def test_nothing_travels_where_documents_start_at_the_cuts(rank):
    group = dist.group.WORLD
    row = sharded((0, 4, 8), boundaries([4, 4]))
    x = torch.ones(1, 4, 2)
    assert left_halo(x, row.before(3), group=group).shape == (1, 0, 2)
    assert not past_inputs(x, 3, row).any()
    assert engine_of(group.group_name).exchanges == 0
