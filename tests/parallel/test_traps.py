"""What users of sequence parallelism have tripped over, by number, each by itself.

15 (norms of replicated parameters) and 19 (resuming) are in tests/runtime/test_sequence.py, 16 (dropout) in
tests/models/test_sequence_parallel.py, 17 (position ids) in test_sharded.py.
"""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqtrain.kernels import delta_rule, linear_attention, short_convolution
from seqtrain.parallel import ShardedSequence, all_scan, flush_scans, start_all_scan
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.halo import CutRow, Traffic, left_halo, past_inputs
from seqtrain.parallel.testing import RankError, rank_outcomes, run_ranks
from tests.parallel.shard_cases import Cut, OperatorCase, joined, sharded, whole


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def delta_case(tokens, *, initial=False):
    """Two heads, so that a mix-up of heads shows."""
    tensors = {
        "q": random(1, tokens, 2, 4),
        "k": F.normalize(random(1, tokens, 2, 4, seed=1), dim=-1),
        "v": random(1, tokens, 2, 3, seed=2),
        "beta": random(1, tokens, 2, seed=3).sigmoid(),
        "log_decay": F.logsigmoid(random(1, tokens, 2, seed=4)),
    }
    return OperatorCase(delta_rule, tensors, {}, random(1, 2, 4, 3, seed=5) if initial else None)


def convolution_case(tokens):
    tensors = {"x": random(1, tokens, 5), "weight": random(5, 4, seed=1)}
    return OperatorCase(short_convolution, tensors, {"activation": "silu"}, random(1, 3, 5, seed=2), shared=("weight",))


def check_against_whole(case, cut, *, ranks=None, members=None):
    """Outputs, final state and gradients of all ranks are those of one process."""
    weights = random(*next(iter(case.tensors.values())).shape[:2], *out_shape(case), seed=9)
    found = run_ranks(ranks or cut.ranks, lambda rank: sharded(case, cut, weights, members=members))
    mine, truth = joined([part for part in found if part], case, cut), whole(case, cut, weights)
    assert mine.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def out_shape(case):
    return (case.tensors["v"] if "v" in case.tensors else case.tensors["x"]).shape[2:]


def test_trap_01_initial_state_on_the_first_rank_and_gradient_of_the_final_state_on_the_last():
    def on_rank(rank):
        factor, update = torch.full((1, 1), 2.0 + rank), torch.ones(1, 1, 1, 1)
        initial = torch.ones(1, 1, 1, 1, requires_grad=True)
        factor.requires_grad_()
        _, final = all_scan(factor, update, group=dist.group.WORLD, initial_state=initial, algorithm="pipeline")
        ((final * (10.0 if rank == 2 else 0.0)).sum()).backward()
        return final.item(), factor.grad.item(), initial.grad.item()

    # S goes 1, 2*1+1 = 3, 3*3+1 = 10, 4*10+1 = 41; each factor's gradient is its S_in times the factors behind it.
    assert run_ranks(3, on_rank) == [(3, 10 * 1 * 3 * 4, 10 * 2 * 3 * 4), (10, 10 * 3 * 4, 0), (41, 10 * 10, 0)]


def test_trap_02_gradients_on_every_rank():
    check_against_whole(delta_case(41, initial=True), Cut((0, 13, 30, 41), (0, 7, 41)))


def test_trap_03_states_travel_in_float32_where_inputs_are_bfloat16():
    q, k, v = (random(1, 24, 2, 4, seed=seed).bfloat16() for seed in range(3))
    _, expected = linear_attention(q, k, v)

    def on_rank(rank):
        with pytest.raises(ValueError, match="states travel in float32"):
            all_scan(None, torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), group=dist.group.WORLD)
        rows = slice(8 * rank, 8 * rank + 8)
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 8, 16, 24))
        return sequence.run(linear_attention, q[:, rows], k[:, rows], v[:, rows])[1]

    final = run_ranks(3, on_rank)[2]
    assert final.dtype == torch.float32
    torch.testing.assert_close(final, expected, rtol=1e-5, atol=1e-5)


def test_trap_04_a_zero_transition_has_an_exact_gradient():
    def on_rank(rank):
        factor = torch.tensor([[0.0, 0.5]]).requires_grad_()  # two heads
        update = torch.full((1, 2, 1, 1), 3.0)
        _, final = all_scan(factor, update, group=dist.group.WORLD, algorithm="tree")
        (final.sum() if rank == 1 else final.sum() * 0).backward()
        return factor.grad.tolist()

    # d final_1 / d factor_1 is rank 1's incoming state, 3: no division by the factor.
    assert run_ranks(2, on_rank) == [[[0, 0]], [[3, 3]]]


def test_trap_05_tensors_may_be_strided_on_one_rank():
    def on_rank(rank):
        update, x = torch.arange(12.0).view(1, 1, 3, 4), torch.arange(12.0).view(1, 4, 3)
        if rank == 0:
            update = update.mT.contiguous().mT
            x = x.mT.contiguous().mT
            assert not update.is_contiguous()
            assert not x.is_contiguous()
        state_in, _ = all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline")
        halo = left_halo(x, Traffic((0, 2), (0, 4, 8)), group=dist.group.WORLD)
        return state_in.flatten().tolist(), halo.flatten().tolist()

    assert run_ranks(2, on_rank)[1] == (list(range(12)), list(range(6, 12)))


def test_trap_06_both_ranks_send_more_than_a_socket_holds_at_once():
    numbers = 1 << 22  # 16 MiB

    def on_rank(rank):
        sizes = [numbers * (peer != rank) for peer in range(2)]
        came = exchange(torch.full((numbers,), float(rank)), sizes, sizes, group=dist.group.WORLD, agreed="both")
        return came.unique().tolist()

    assert run_ranks(2, on_rank, limit=30) == [[1], [0]]


def test_trap_07_a_receive_of_another_size_is_an_error_and_no_abort():
    def on_rank(rank):
        wanted = (0, rank)  # rank 0 believes that rank 1 wants its two tokens, which wants one
        left_halo(torch.ones(1, 2, 3), Traffic(wanted, (0, 2, 4)), group=dist.group.WORLD)
        flush_scans(dist.group.WORLD)

    outcomes = rank_outcomes(2, on_rank, limit=30, group_timeout=1)
    assert "disagree about what is sent" in str(outcomes[1])
    assert "died without a word" not in str(outcomes)


def test_trap_08_scans_in_flight_keep_the_order_of_their_start():
    def on_rank(rank):
        scans = [
            start_all_scan(None, torch.full((1, 1, size, 1), float(size)), group=dist.group.WORLD, algorithm="pipeline")
            for size in (3, 1, 3)
        ]
        return [scan.wait()[0].unique().item() for scan in reversed(scans)]

    assert run_ranks(2, on_rank)[1] == [3, 1, 3]


def test_trap_09_a_group_is_dead_after_an_error_and_says_so():
    store = dist.distributed_c10d._get_default_store

    def on_rank(rank):
        if rank == 0:
            store().wait(["it is dead"])
            return
        x, traffic = torch.ones(1, 2, 3), Traffic((0, 0), (0, 2, 4))
        with pytest.raises(RuntimeError, match="messages failed on rank 1 of 2"):
            left_halo(x, traffic, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="dead since"):
            left_halo(x, traffic, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="dead since"):
            all_scan(None, torch.ones(1, 1, 2, 2), group=dist.group.WORLD, algorithm="tree")
        store().set("it is dead", "yes")

    assert rank_outcomes(2, on_rank, limit=30, group_timeout=1) == [None, None]


@pytest.mark.parametrize("make", [delta_case, convolution_case])
def test_trap_10_ranks_of_a_group_are_not_ranks_of_the_world(make):
    check_against_whole(make(23), Cut((0, 11, 23), (0, 4, 23)), ranks=4, members=[1, 3])


@pytest.mark.parametrize("make", [delta_case, convolution_case])
@pytest.mark.parametrize("offsets", [(0, 0, 1, 21), (0, 1, 3, 21), (0, 19, 20, 21), (0, 20, 21, 21)])
def test_trap_11_ranks_with_hardly_any_tokens(make, offsets):
    # W - 1 = 3 tokens are wanted from the left, a chunk is 16 at least.
    check_against_whole(make(21), Cut(offsets, (0, 21)))


@pytest.mark.parametrize("make", [delta_case, convolution_case])
@pytest.mark.parametrize("boundaries", [(0, 7, 14, 21), (0, 5, 19, 21), (0, 7, 7, 21)])
def test_trap_12_documents_that_start_at_cuts_or_span_three_ranks(make, boundaries):
    check_against_whole(make(21), Cut((0, 7, 14, 21), boundaries))


def test_trap_13_the_gradient_of_a_convolutions_halo_returns_to_the_rank_before():
    def on_rank(rank):
        x = torch.zeros(1, 2, 1, requires_grad=True)
        past = past_inputs(x, 3, row=CutRow(dist.group.WORLD, (0, 2, 4, 6)))
        (past * torch.tensor([1.0, 10.0, 100.0])[:, None] * (rank + 1)).sum().backward()
        return x.grad.flatten().tolist()

    # Tokens 0 and 1 are the 10 and the 100 of rank 1, token 1 is also the 1 of rank 2; tokens 2 and 3 its 10 and 100.
    assert run_ranks(3, on_rank) == [[20, 203], [30, 300], [0, 0]]


def test_trap_14_cuts_that_are_not_multiples_of_a_chunk():
    check_against_whole(delta_case(200), Cut((0, 67, 131, 200), (0, 90, 200)))


@pytest.mark.timeout(60)
def test_trap_18_an_exception_on_one_rank_ends_the_others():
    def on_rank(rank):
        if rank == 1:
            raise KeyError("my own error")
        for _ in range(20):
            left_halo(torch.ones(1, 2, 3), Traffic((0, 0, 2), (0, 2, 4, 6)), group=dist.group.WORLD)
            all_scan(None, torch.ones(1, 1, 2, 2), group=dist.group.WORLD, algorithm="pipeline")
        threading.Event().wait()

    # By the closed connection, since the group would wait for 1000 s.
    outcomes = rank_outcomes(3, on_rank, limit=30, group_timeout=1000)
    assert "KeyError: 'my own error'" in str(outcomes[1])
    for rank in (0, 2):
        assert isinstance(outcomes[rank], RankError)
        assert "did not end" not in str(outcomes[rank])


def test_trap_20_forked_ranks_compute_after_the_parent_has():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.ones(600, 600)
        big @ big
        assert run_ranks(2, lambda rank: (big @ big)[0, 0].item(), limit=30) == [600, 600]
    finally:
        torch.set_num_threads(threads)
