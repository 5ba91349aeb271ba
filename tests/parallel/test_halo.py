"""What lies left of a rank: rows of earlier ranks in order, their gradients back at their owners, past inputs."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.kernels import short_convolution
from seqtrain.parallel import flush_scans, start_all_scan
from seqtrain.parallel.exchange import EXCHANGES_IN_FLIGHT, exchange
from seqtrain.parallel.halo import CutRow, Traffic, left_halo, past_inputs, run_with_past_inputs
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
            row = CutRow(group, offsets, None if documents is None else boundaries(documents))
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


# Trap 11: ranks with 0 and 1 tokens, and with fewer than are wanted, so that a halo spans ranks.
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_come_in_order_and_gradients_go_home(ranks):
    run_ranks(ranks, rows_and_gradients, ranks)


def convolutions(rank, ranks):
    group = dist.group.WORLD
    for width in (1, 4, 9):
        weight = torch.randn(5, width, dtype=torch.float64)
        x, d_out = (torch.randn(2, TOKENS, 5, dtype=torch.float64) for _ in range(2))
        initial, d_state = (torch.randn(2, width - 1, 5, dtype=torch.float64) for _ in range(2))
        for tensor in (weight, x, d_out, initial, d_state):
            dist.broadcast(tensor, 0)
        for offsets in OFFSETS[ranks]:
            for documents in DOCUMENTS.values():
                for given in (False, True):
                    case = (width, offsets, documents, given)
                    rows = slice(0, 2 if documents is None else 1)
                    tensors = [tensor[rows] for tensor in (x, d_out, initial, d_state)]
                    convolution(case, group, weight, *tensors)


def convolution(case, group, weight, x, d_out, initial, d_state):
    """One convolution against one process: outputs, the last rank's state, gradients of x and of both states."""
    (width, offsets, documents, given), rank = case, group.rank()
    cu_seqlens = None if documents is None else boundaries(documents)
    own, last = slice(offsets[rank], offsets[rank + 1]), group.size() - 1

    whole, past = x.clone().requires_grad_(), initial.clone().requires_grad_()
    state = past
    if documents is not None:
        state = torch.cat([past, past.new_zeros(len(documents) - 1, *past.shape[1:])])
    out, final = short_convolution(whole, weight, initial_state=state if given else None, cu_seqlens=cu_seqlens)
    ((out * d_out).sum() + (final[-len(x) :] * d_state).sum()).backward()

    mine, own_past = x[:, own].clone().requires_grad_(), initial.clone().requires_grad_()
    came, after = run_with_past_inputs(
        short_convolution,
        mine,
        weight,
        count=width - 1,
        row=CutRow(group, offsets, cu_seqlens),
        initial_state=own_past if given else None,
        options={"activation": "none"},
    )
    ((came * d_out[:, own]).sum() + (after * d_state).sum() * (rank == last)).backward()
    pairs = {"out": (came, out[:, own]), "x": (mine.grad, whole.grad[:, own])}
    if rank == last:
        pairs["state"] = (after, final[-len(x) :])
    if given:
        pairs["past"] = (own_past.grad, past.grad if rank == 0 else torch.zeros_like(past))
    for name, (here, true) in pairs.items():
        torch.testing.assert_close(here, true, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{case} {n}: {text}")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_short_convolution_over_ranks(ranks):
    run_ranks(ranks, convolutions, ranks)


# States after each rank, not only the last: what a rank without tokens has is the state of the one before.
def states_after(rank, ranks):
    group, offsets = dist.group.WORLD, (0, 4, 4, 9)
    x = torch.arange(9.0)[None, :, None]
    own = x[:, offsets[rank] : offsets[rank + 1]]
    row = CutRow(group, offsets, boundaries([2, 5, 2]))
    past = past_inputs(own, 3, row=row)[0, :, 0].tolist()
    _, state = run_with_past_inputs(short_convolution, own, torch.ones(1, 4), count=3, row=row, options={})
    return past, state[0, :, 0].tolist()


def test_states_after_each_rank():
    results = run_ranks(3, states_after, 3)
    assert [past for past, _ in results] == [[0, 0, 0], [0, 2, 3], [0, 2, 3]]
    assert [state for _, state in results] == [[0, 2, 3], [0, 2, 3], [0, 7, 8]]


# Ranks of the group are not ranks of the world, and both groups talk at once.
def sub_groups(rank):
    odd, even = dist.new_group([1, 3]), dist.new_group([0, 2])
    own = torch.full((1, 2, 1), float(rank), requires_grad=True)
    halo = left_halo(own, Traffic((0, 1), (0, 2, 4)), group=odd if rank % 2 else even)
    halo.sum().backward()
    return halo.flatten().tolist(), own.grad.flatten().tolist()


def test_groups_that_are_not_the_world():
    assert run_ranks(4, sub_groups) == [([], [0, 1]), ([], [0, 1]), ([0], [0, 0]), ([1], [0, 0])]


# Scans on the same group, running on their own thread, take no message of a halo for theirs.
def among_scans(rank, ranks):
    group, row = dist.group.WORLD, CutRow(dist.group.WORLD, (0, 4, 8, 12))
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
    behind = ranks - 1 - rank
    assert x.grad[0, 0].tolist() == [total * behind] * 6
    assert x.grad[0, 3].tolist() == [total * (behind > 0)] * 6


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


def test_a_rank_runs_ahead_of_those_it_sends_to():
    run_ranks(2, run_ahead, limit=30)


# Where gloo alone would abort the process, since a message has another size than its receive.
def test_ranks_that_disagree_get_an_error():
    def wrong(rank):
        wanted = 1 if rank == 0 else 0
        left_halo(torch.ones(1, 2, 3), Traffic((0, wanted), (0, 2, 4)), group=dist.group.WORLD)
        flush_scans(dist.group.WORLD)

    outcomes = rank_outcomes(2, wrong, limit=30, group_timeout=2)
    assert all(isinstance(outcome, RankError) for outcome in outcomes), outcomes
    assert "messages failed on rank 1 of 2" in str(outcomes[1])
    assert "disagree about what is sent" in str(outcomes[1])


# Where nobody wants anything, nobody communicates.
def nothing_wanted(rank):
    group = dist.group.WORLD
    row = CutRow(group, (0, 4, 8), boundaries([4, 4]))
    x = torch.ones(1, 4, 2)
    assert left_halo(x, row.before(3), group=group).shape == (1, 0, 2)
    assert past_inputs(x, 3, row=row).tolist() == torch.zeros(1, 3, 2).tolist()
    return engine_of(group.group_name).exchanges


def test_nothing_travels_where_documents_start_at_the_cuts():
    assert run_ranks(2, nothing_wanted) == [0, 0]
