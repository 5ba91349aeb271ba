"""Windows with sinks on a sharded row: outputs, states and every gradient are those of the whole row."""

import itertools

import pytest
import torch
import torch.distributed as dist

from seqtrain.kernels import sink_attention
from seqtrain.parallel import SequenceContext, ShardedSequence, relay
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import relative_error
from tests.parallel.shard_cases import CUTS, Cut

HEADS, GROUPS, KEY, VALUE = 4, 2, 6, 5
LIMIT = 1e-11
# Windows and sinks, each shorter and longer than some rank's tokens.
REACHES = [(1, 3), (90, 7), (20, 0), (3, 80)]
STATE = ("k", "v", "sink_k", "sink_v")


def make(cut, *, batch=1, before=None, seed=0):
    """The tensors of a row and its weights; and the state of a row of `before` tokens, by its own reach."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, cut.tokens, *shape, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(HEADS, KEY), "k": normal(GROUPS, KEY), "v": normal(GROUPS, VALUE)}
    tensors |= {"extra_score": normal(HEADS), "extra_value": normal(HEADS, VALUE)}
    return tensors, normal(HEADS, VALUE)


def past_state(window, sinks, lengths):
    """The state of rows that were `lengths` tokens long."""
    generator = torch.Generator().manual_seed(3)
    states = []
    for length in lengths:
        shapes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
        row = [torch.randn(1, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        states.append(sink_attention(*row, window=window, sinks=sinks)[1])
    return {key: torch.cat([state[key] for state in states]) for key in states[0]}


def outcome(sequence, tensors, weight, past, *, window, sinks, own, last):
    """`out`, the state after it, and the gradients of a loss on the outputs and, on the `last` rank, on the state."""
    leaves = {name: x[:, own].clone().requires_grad_() for name, x in tensors.items()}
    given = {name: x.clone().requires_grad_() for name, x in (past or {}).items() if name != "length"}
    initial = None if past is None else given | {"length": past["length"]}
    if initial is not None and sequence.cu_seqlens is not None and not isinstance(sequence, ShardedSequence):
        # The state is the first document's.
        more = len(sequence.cu_seqlens) - 2
        initial = {name: torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for name, x in initial.items()}
    out, state = sequence.run(sink_attention, *leaves.values(), initial_state=initial, window=window, sinks=sinks)
    batch = len(weight)
    state = {name: x[-batch:] for name, x in state.items()}
    loss = (out * weight[:, own]).sum()
    if last:
        loss = loss + sum(state[name].sin().sum() for name in STATE)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    past_gradients = {f"past {name}": leaf.grad for name, leaf in given.items()}
    return {"out": out.detach()} | gradients, past_gradients, {name: x.detach() for name, x in state.items()}


def agree(cut, lengths, *, batch=1):
    """Every reach on this row, in one launch of ranks."""
    pasts = [None if lengths is None else past_state(*reach, lengths) for reach in REACHES]
    tensors, weight = make(cut, batch=batch)
    final = max(rank for rank in range(cut.ranks) if cut.offsets[rank + 1] > cut.offsets[rank])

    def on_rank(rank):
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
        own = slice(cut.offsets[rank], cut.offsets[rank + 1])
        return [
            outcome(sequence, tensors, weight, past, window=window, sinks=sinks, own=own, last=rank == final)
            for (window, sinks), past in zip(REACHES, pasts, strict=True)
        ]

    found = run_ranks(cut.ranks, on_rank)
    errors = {}
    for number, ((window, sinks), past) in enumerate(zip(REACHES, pasts, strict=True)):
        whole = outcome(
            SequenceContext(cut.cu_seqlens),
            tensors,
            weight,
            past,
            window=window,
            sinks=sinks,
            own=slice(None),
            last=True,
        )
        ranks = [rank[number] for rank in found]
        came = {name: torch.cat([timed[name] for timed, _, _ in ranks], 1) for name in whole[0]}
        came |= {name: torch.stack([given[name] for _, given, _ in ranks]).sum(0) for name in whole[1]}
        came |= {f"state {name}": x for name, x in ranks[final][2].items()}
        expected = whole[0] | whole[1] | {f"state {name}": x for name, x in whole[2].items()}
        errors |= {(window, sinks, name): relative_error(came[name], expected[name]) for name in expected}
    assert {case: error for case, error in errors.items() if not error <= LIMIT} == {}


@pytest.mark.parametrize(
    ("cut", "before"),
    [
        ("uneven", 2),
        *(
            pytest.param(*case, marks=pytest.mark.all)
            for case in (
                *itertools.product(CUTS, [None]),
                *itertools.product(["one document", "empty ranks", "few tokens"], [2]),
                *[("across three ranks", 40), ("empty ranks", 40), ("one document", 0)],
            )
        ),
    ],
)
def test_a_sharded_row_gives_what_the_whole_one_gives(cut, before):
    agree(CUTS[cut], None if before is None else [before])


@pytest.mark.all
@pytest.mark.parametrize("lengths", [None, [1, 30]])
def test_rows_of_a_batch_have_sinks_of_their_own(lengths):
    """With pasts of different lengths their sinks fill up at different tokens."""
    agree(Cut((0, 1, 4, 31), None), lengths, batch=2)


@pytest.mark.all
def test_ranks_do_not_wait_for_each_other(monkeypatch):
    """The operator runs at once on every rank: its state is not handed on."""

    def refuse(*unused):
        raise AssertionError("relayed")

    monkeypatch.setattr("seqtrain.parallel.relay._pass_on", refuse)
    monkeypatch.setattr(relay, "_receive", refuse)
    agree(CUTS["one document"], None)


@pytest.mark.all
def test_nothing_leaks_into_the_next_document():
    """Another last token in one document leaves the next one's outputs as they were, to the bit."""
    cut = Cut((0, 20, 43, 60), (0, 25, 60))
    tensors, _ = make(cut)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[:, 24] *= 0.5

    def on_rank(rank):
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
        own = slice(cut.offsets[rank], cut.offsets[rank + 1])
        with torch.no_grad():
            return [
                sequence.run(sink_attention, *(x[:, own] for x in each.values()), window=6, sinks=30)[0]
                for each in (tensors, changed)
            ]

    before, after = (torch.cat(parts, 1) for parts in zip(*run_ranks(3, on_rank), strict=True))
    assert torch.equal(before[:, 25:], after[:, 25:])
    assert not torch.equal(before[:, 24], after[:, 24])
