"""What lies left of a rank: rows of earlier ranks in order, their gradients back at their owners, past inputs."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.kernels import short_convolution
from seqtrain.parallel import ShardedSequence, all_scan, flush_scans, start_all_scan
from seqtrain.parallel.exchange import EXCHANGES_IN_FLIGHT, exchange
from seqtrain.parallel.halo import HaloPlan, ShardedRow, left_halo, past_inputs
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.testing import RankError, rank_outcomes, run_ranks
from seqtrain.testing import boundaries

TOKENS = 19
OFFSETS = {
    2: [(0, 9, 19), (0, 0, 19), (0, 19, 19)],
    3: [(0, 7, 13, 19), (0, 1, 2, 19), (0, 5, 5, 19), (0, 18, 19, 19), (0, 0, 0, 19)],
    4: [(0, 4, 5, 12, 19), (0, 0, 2, 2, 19), (0, 1, 2, 3, 19)],
}
# The row alone; a document over several ranks; starts at cuts, one document empty; shorter than any filter.
DOCUMENTS = {"whole": None, "long": [2, 15, 2], "at cuts": [5, 2, 0, 5, 7], "short": [1, 2, 1, 1, 3, 1, 2, 4, 1, 1, 2]}


def expected_positions(offsets, documents, rank, count, given):
    """Positions before the rank's first token, token by token."""
    document_of = [n for n, length in enumerate(documents or [TOKENS]) for _ in range(length)]
    start, end = offsets[rank : rank + 2]
    own = document_of[start] if end > start else document_of[start - 1] if start else document_of[0]
    positions = range(max(start - count, -given), start)
    return [p for p in positions if (document_of[p] if p >= 0 else document_of[0]) == own]


def rows_and_gradients(rank, ranks):
    group = dist.group.WORLD
    x = torch.randn(1, TOKENS, 2, 3, dtype=torch.float64)
    dist.broadcast(x, 0)
    for offsets in OFFSETS[ranks]:
        for documents in DOCUMENTS.values():
            row = ShardedRow(group, offsets, None if documents is None else boundaries(documents))
            for count in (0, 1, 3, 8, 30):
                own = x[:, offsets[rank] : offsets[rank + 1]].clone().requires_grad_()
                halo = left_halo(own, row.before(count), group=group)
                wanted = [expected_positions(offsets, documents, r, count, 0) for r in range(ranks)]
                assert torch.equal(halo, x[:, wanted[rank]]), f"{offsets} {documents} {count} on rank {rank}"
                # Rank r weighs its halo by r + 1: a token's gradient names the ranks that have seen it.
                ((rank + 1) * halo.sum() + 0 * own.sum()).backward()
                for index, position in enumerate(range(*offsets[rank : rank + 2])):
                    seen = sum(r + 1 for r in range(ranks) if position in wanted[r])
                    assert own.grad[0, index].unique().tolist() == [seen]


# Ranks with 0 and 1 tokens, and with fewer than are wanted, so that a halo spans ranks.
@pytest.mark.parametrize(
    "ranks", [pytest.param(ranks, marks=() if ranks == 3 else pytest.mark.all) for ranks in (2, 3, 4)]
)
def test_rows_come_in_order_and_gradients_go_home(ranks):
    run_ranks(ranks, rows_and_gradients, ranks)


def test_gradients_of_past_inputs_by_hand():
    def on_rank(rank):
        x = torch.zeros(1, 2, 1, requires_grad=True)
        past = past_inputs(x, 3, row=ShardedRow(dist.group.WORLD, (0, 2, 4, 6)))
        (past * torch.tensor([1.0, 10.0, 100.0])[:, None] * (rank + 1)).sum().backward()
        return x.grad.flatten().tolist()

    # Tokens 0 and 1 are the 10 and the 100 of rank 1, token 1 is also the 1 of rank 2; tokens 2 and 3 its 10 and 100.
    assert run_ranks(3, on_rank) == [[20, 203], [30, 300], [0, 0]]


# States after each rank, not only the last: what a rank without tokens has is the state of the one before.
def states_after(rank, ranks):
    group, offsets = dist.group.WORLD, (0, 4, 4, 9)
    x = torch.arange(9.0)[None, :, None]
    own = x[:, offsets[rank] : offsets[rank + 1]]
    sequence = ShardedSequence(group=group, offsets=offsets, cu_seqlens=boundaries([2, 5, 2]))
    past = past_inputs(own, 3, row=sequence.row)[0, :, 0].tolist()
    _, state = sequence.run(short_convolution, own, torch.ones(1, 4))
    return past, state[0, :, 0].tolist()


@pytest.mark.all
def test_states_after_each_rank():
    results = run_ranks(3, states_after, 3)
    assert [past for past, _ in results] == [[0, 0, 0], [0, 2, 3], [0, 2, 3]]
    assert [state for _, state in results] == [[0, 2, 3], [0, 2, 3], [0, 7, 8]]


# Ranks of the group are not ranks of the world, and both groups talk at once.
def sub_groups(rank):
    odd, even = dist.new_group([1, 3]), dist.new_group([0, 2])
    own = torch.full((1, 2, 1), float(rank), requires_grad=True)
    halo = left_halo(own, HaloPlan((0, 1), (0, 2, 4)), group=odd if rank % 2 else even)
    halo.sum().backward()
    return halo.flatten().tolist(), own.grad.flatten().tolist()


@pytest.mark.all
def test_groups_that_are_not_the_world():
    assert run_ranks(4, sub_groups) == [([], [0, 1]), ([], [0, 1]), ([0], [0, 0]), ([1], [0, 0])]


# Scans on the same group, running on their own thread, take no message of a halo for theirs.
def among_scans(rank, ranks):
    group, row = dist.group.WORLD, ShardedRow(dist.group.WORLD, (0, 4, 8, 12))
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
    total = float(sum(range(12)))
    after = ranks - 1 - rank
    assert x.grad[0, 0].tolist() == [total * after] * 6
    assert x.grad[0, 3].tolist() == [total * (after > 0)] * 6


@pytest.mark.all
def test_scans_and_halos_share_a_group():
    run_ranks(3, among_scans, 3, limit=30)


# A rank may be far ahead of one that only receives from it; what it sends, 16 MiB in all, fits in no socket.
def run_ahead(rank):
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


@pytest.mark.all
def test_a_rank_runs_ahead_of_those_it_sends_to():
    run_ranks(2, run_ahead, limit=30)


# gloo's `send` against `send` would wait for ever: 16 MiB fit in no socket.
@pytest.mark.all
def test_both_ranks_send_at_once():
    numbers = 1 << 22

    def on_rank(rank):
        sizes = [numbers * (peer != rank) for peer in range(2)]
        came = exchange(torch.full((numbers,), float(rank)), sizes, sizes, group=dist.group.WORLD, agreed="both")
        return came.unique().tolist()

    assert run_ranks(2, on_rank, limit=30) == [[1], [0]]


# gloo rejects a strided tensor on the rank that has it, and the others die by time-out.
@pytest.mark.all
def test_inputs_may_be_strided_on_one_rank():
    def on_rank(rank):
        x = torch.arange(12.0).view(1, 4, 3)
        x = x.mT.contiguous().mT if rank == 0 else x
        assert x.is_contiguous() == bool(rank)
        return left_halo(x, HaloPlan((0, 2), (0, 4, 8)), group=dist.group.WORLD).flatten().tolist()

    assert run_ranks(2, on_rank)[1] == list(range(6, 12))


# Where gloo alone would abort the process, since a message has another size than its receive.
@pytest.mark.all
def test_ranks_that_disagree_get_an_error():
    def wrong(rank):
        wanted = 1 if rank == 0 else 0
        left_halo(torch.ones(1, 2, 3), HaloPlan((0, wanted), (0, 2, 4)), group=dist.group.WORLD)
        flush_scans(dist.group.WORLD)

    outcomes = rank_outcomes(2, wrong, limit=30, group_timeout=2)
    assert all(isinstance(outcome, RankError) for outcome in outcomes), outcomes
    assert "messages failed on rank 1 of 2" in str(outcomes[1])
    assert "disagree about what is sent" in str(outcomes[1])


@pytest.mark.all
def test_a_group_is_dead_after_a_message_failed():
    store = dist.distributed_c10d._get_default_store

    def on_rank(rank):
        if rank == 0:
            store().wait(["it is dead"])
            return
        x, plan = torch.ones(1, 2, 3), HaloPlan((0, 0), (0, 2, 4))
        with pytest.raises(RuntimeError, match="messages failed on rank 1 of 2"):
            left_halo(x, plan, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="dead since"):
            left_halo(x, plan, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="dead since"):
            all_scan(None, torch.ones(1, 1, 2, 2), group=dist.group.WORLD, algorithm="tree")
        store().set("it is dead", "yes")

    assert rank_outcomes(2, on_rank, limit=30, group_timeout=1) == [None, None]


# Where nobody wants anything, nobody communicates.
def nothing_wanted(rank):
    group = dist.group.WORLD
    row = ShardedRow(group, (0, 4, 8), boundaries([4, 4]))
    x = torch.ones(1, 4, 2)
    assert left_halo(x, row.before(3), group=group).shape == (1, 0, 2)
    assert past_inputs(x, 3, row=row).tolist() == torch.zeros(1, 3, 2).tolist()
    return engine_of(group.group_name).exchanges


@pytest.mark.all
def test_nothing_travels_where_documents_start_at_the_cuts():
    assert run_ranks(2, nothing_wanted) == [0, 0]
