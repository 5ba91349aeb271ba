"""Operators on a sharded row give what they give on the whole row: outputs and every gradient, on every rank."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqtrain.kernels import (
    delta_rule,
    diagonal_scan,
    linear_attention,
    operator,
    short_convolution,
    slot_scores,
    tensor_attention,
)
from seqtrain.parallel import SequenceContext, ShardedSequence
from seqtrain.parallel.testing import run_ranks
from tests.parallel.ranks import on_ranks
from tests.parallel.shard_cases import CUTS, Cut, OperatorCase, assert_nothing_leaks, assert_same_as_whole, cuts


def operator_cases(cut: Cut, dtype: torch.dtype, *, initial: bool) -> dict[str, OperatorCase]:
    generator = torch.Generator().manual_seed(cut.tokens)

    def random(*shape, kind=dtype):
        return torch.randn(shape, dtype=kind, generator=generator)

    def state(*shape, kind=dtype):
        return random(1, *shape, kind=kind) if initial else None

    tokens, heads, key, value = cut.tokens, 2, 4, 3
    q, k, v = random(1, tokens, heads, key), random(1, tokens, heads, key), random(1, tokens, heads, value)
    k = F.normalize(k, dim=-1)
    beta = torch.sigmoid(random(1, tokens, heads)) * 2
    by_head, by_channel = F.logsigmoid(random(1, tokens, heads)), F.logsigmoid(random(1, tokens, heads, key) + 2)
    memory = (heads, key, value)
    cases = {}
    for name, decay in (("none", None), ("fixed", by_head[0, 0]), ("head", by_head), ("channel", by_channel)):
        shared = ("log_decay",) if name == "fixed" else ()
        tensors = {"q": q, "k": k, "v": v, "log_decay": decay}
        cases[f"linear_attention {name}"] = OperatorCase(linear_attention, tensors, {}, state(*memory), shared=shared)
        if name != "fixed":
            tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": decay}
            cases[f"delta_rule {name}"] = OperatorCase(delta_rule, tensors, {"scale": 0.7}, state(*memory))
    tensors = {"q": q, "k": k, "written": -torch.expm1(by_channel[..., :value]), "log_decay": by_channel[..., :value]}
    cases["slot_scores"] = OperatorCase(slot_scores, tensors, {"scale": 0.7}, state(heads, value, key))
    x = random(1, tokens, 5)
    log_a = F.logsigmoid(random(1, tokens, 5) + 2)
    cases["diagonal_scan"] = OperatorCase(diagonal_scan, {"x": x, "log_a": log_a}, {}, state(5))
    complex_kind = torch.promote_types(dtype, torch.complex64)
    rates = torch.complex(log_a[0, 0], random(5))
    x = random(1, tokens, 5, kind=complex_kind)
    cases["diagonal_scan fixed complex"] = OperatorCase(
        diagonal_scan, {"x": x, "log_a": rates}, {}, state(5, kind=complex_kind), shared=("log_a",)
    )
    for width in (1, 4, 9):
        tensors = {"x": x.real.contiguous(), "weight": random(5, width)}
        options = {"activation": "silu" if width == 4 else "none"}
        cases[f"short_convolution {width}"] = OperatorCase(
            short_convolution, tensors, options, state(width - 1, 5), shared=("weight",)
        )
    tensors = {"q": q / 2, "k1": k, "k2": random(1, tokens, heads, key) / 2, "v1": v, "v2": v.flip(1)}
    sums = None if not initial else random(1, heads, 2, 15, value + 1).abs()
    cases["tensor_attention"] = OperatorCase(tensor_attention, tensors, {"degree": 2}, sums)
    return cases


@pytest.mark.parametrize("cut", cuts(quick="uneven"))
def test_outputs_and_gradients(cut):
    continued = operator_cases(cut, torch.float64, initial=True)
    afresh = {f"{name} afresh": case for name, case in operator_cases(cut, torch.float64, initial=False).items()}
    assert_same_as_whole(continued | afresh, cut)


@pytest.mark.all
def test_float32():
    cut = CUTS["across three ranks"]
    assert_same_as_whole(operator_cases(cut, torch.float32, initial=True), cut, limit=1e-5)


@pytest.mark.all
def test_ranks_that_are_not_the_worlds_first():
    cut = Cut((0, 40, 131), (0, 17, 131))
    assert_same_as_whole(operator_cases(cut, torch.float64, initial=True), cut, members=[1, 3])


@pytest.mark.all
def test_states_travel_in_float32_where_inputs_are_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 24, 2, 4, generator=generator).bfloat16() for _ in range(3))
    _, expected = linear_attention(q, k, v)

    def on_rank(rank):
        rows = slice(8 * rank, 8 * rank + 8)
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 8, 16, 24))
        return sequence.run(linear_attention, q[:, rows], k[:, rows], v[:, rows])[1]

    final = run_ranks(3, on_rank)[2]
    assert final.dtype == torch.float32
    torch.testing.assert_close(final, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.all
@pytest.mark.parametrize("last", [66, 67, 89, 142], ids=["before a cut", "at a cut", "rank's last", "third rank"])
def test_nothing_leaks_into_the_next_document(last):
    cut = Cut((0, 67, 90, 143, 201), (0, last + 1, 201))
    assert_nothing_leaks(operator_cases(cut, torch.float32, initial=False), cut, last)


@operator(arguments={"x": "B T D"}, out="B T D", flops=lambda **_: 0)
def running_maximum(x, *, initial_state=None, cu_seqlens=None, backend):
    """An operator that no affine map describes, with the state in a dict."""
    boundaries = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outs, states = [], []
    for n, (start, end) in enumerate(pairwise(boundaries)):
        state = torch.full_like(x[:, 0] if x.shape[1] else x.sum(1), -1.0)
        if initial_state is not None:
            state = initial_state["largest"][n : n + 1]
        for t in range(start, end):
            state = torch.logaddexp(state, x[:, t])
            outs.append(state)
        states.append(state)
    return torch.stack(outs, 1) if outs else x[:, :0], {"largest": torch.cat(states)}


def relayed(sequence, x, weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    out, _ = sequence.run(running_maximum, x)
    (out * weight).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("cut", cuts(quick="few tokens", packed=True))
def test_an_operator_that_is_no_affine_map_is_relayed(cut):
    generator = torch.Generator().manual_seed(0)
    row = [torch.randn(1, cut.tokens, 3, dtype=torch.float64, generator=generator) for _ in range(2)]

    def run(rank: int) -> tuple:
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
        return relayed(sequence, *(x[:, cut.offsets[rank] : cut.offsets[rank + 1]] for x in row))

    truth = relayed(SequenceContext(cut.cu_seqlens), *row)
    for parts, expected in zip(zip(*run_ranks(cut.ranks, run), strict=True), truth, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_positions_are_the_rows_and_restart_with_each_document():
    cut = CUTS["uneven"]

    def run(rank: int) -> list:
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
        tokens = cut.offsets[rank + 1] - cut.offsets[rank]
        here = torch.device("cpu")
        before, after = sequence.count(torch.tensor([100]), 1, tokens, here)
        doubled = sequence.repeated(2)
        return [
            (sequence.positions(tokens, here) + before)[0].tolist(),
            after.tolist(),
            (doubled.offsets, doubled.cu_seqlens.tolist()),
            sequence.grouped(30).positions(tokens, here).tolist(),
            sequence.grouped(30, None, 7).boundaries,
        ]

    found = run_ranks(cut.ranks, run)
    places = SequenceContext(cut.cu_seqlens).positions(cut.tokens, torch.device("cpu"))
    expected = places.clone()
    expected[:5] += 100  # the first document alone continues what came before
    assert [place for part in found for place in part[0]] == expected.tolist()
    assert [part[1] for part in found] == [[27], [6], [51]]
    twice = (tuple(2 * offset for offset in cut.offsets), [2 * boundary for boundary in cut.boundaries])
    assert all(part[2] == twice for part in found)
    assert [place for part in found for place in part[3]] == (places % 30).tolist()
    shifted = [start for start, place in enumerate(places.tolist()) if place == 0 or (place + 7) % 30 == 0]
    assert all(part[4] == (*shifted, cut.tokens) for part in found)


@on_ranks(3, quick=True, group_timeout=10)
def test_gradients_come_through_a_rank_without_tokens(rank):
    """Of a scan whose decays have none: what such a rank sends on depends on no number of its own."""
    offsets = (0, 5, 5, 9)
    row = ShardedSequence(group=dist.group.WORLD, offsets=offsets)
    x = torch.ones(1, offsets[rank + 1] - offsets[rank], 2, requires_grad=True)
    log_a = torch.full_like(x, -0.5, requires_grad=False)
    out, _ = row.run(diagonal_scan, x, log_a)
    out, _ = row.run(short_convolution, out, torch.ones(2, 2))
    out.sum().backward()
    whole = torch.ones(1, 9, 2, requires_grad=True)
    out, _ = diagonal_scan(whole, torch.full_like(whole, -0.5, requires_grad=False))
    short_convolution(out, torch.ones(2, 2))[0].sum().backward()
    torch.testing.assert_close(x.grad, whole.grad[:, row.start : row.end])


@on_ranks(2, quick=True)
def test_offsets_that_do_not_fit(rank):
    for offsets in ((0, 5), (0, 4, 3), (1, 4, 10), (0, 4, 9)):
        with pytest.raises(ValueError, match=r"offsets.*expected"):
            ShardedSequence(group=dist.group.WORLD, offsets=offsets, cu_seqlens=torch.tensor([0, 10]))


@operator(arguments={"x": "B T D", "weight": "G K V"}, out="B T D", flops=lambda **_: 0)
def scaled(x, weight, *, initial_state=None, cu_seqlens=None, backend):
    """An operator with a learned weight of three dimensions, none of them time."""
    states = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x * weight.sum(), x.new_zeros(states, 1)


@on_ranks(2, quick=True)
def test_a_weight_as_wide_as_a_rank_has_tokens_is_not_cut_in_time(rank):
    documents = torch.tensor([0, 10, 20, 32], dtype=torch.int32)
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 16, 32), cu_seqlens=documents)
    for width in (15, 16):
        out, _ = sequence.run(scaled, torch.ones(1, 16, 1), torch.ones(2, width, 3))
        assert out.unique().tolist() == [width * 6.0]


def test_groups_do_not_cut_it_either():
    for width in (15, 16):
        out, _ = SequenceContext().grouped(5).run(scaled, torch.ones(2, width, 1), torch.ones(2, width, 3))
        assert out.unique().tolist() == [width * 6.0]
