"""Softmax attention over ranks against one process: outputs, states and the gradients of q, k and v on every rank."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from seqtrain.kernels import softmax_attention
from seqtrain.parallel import ShardedSequence, checkpoint_contexts
from seqtrain.parallel.block_attention import block_attention
from seqtrain.parallel.halo import HaloPlan, left_halo
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import boundaries
from tests.parallel.ranks import on_ranks

TOKENS = 29
# Documents in a row of 29 tokens: none but the row; over three ranks; starts at cuts, one empty; many short ones.
DOCUMENTS = {"whole": None, "long": [2, 21, 6], "at cuts": [7, 8, 0, 14], "short": [1, 3, 2, 5, 4, 1, 1, 6, 3, 3]}
OFFSETS = {
    2: [(0, 14, 29), (0, 0, 29), (0, 28, 29)],
    3: [(0, 7, 15, 29), (0, 1, 2, 29), (0, 12, 12, 29), (0, 20, 29, 29)],
    4: [(0, 7, 8, 22, 29), (0, 0, 11, 11, 29), (0, 3, 15, 16, 29)],
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def random_inputs(heads, groups, *, seed=0, batch=1, past=None, tokens=TOKENS):
    """q, k, v, the output's weight and, for `past` rows, an initial state; float64, K=6, V=4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows, *shape):
        return torch.randn(batch, rows, *shape, dtype=torch.float64, generator=generator)

    row = [normal(tokens, heads, 6), normal(tokens, groups, 6), normal(tokens, groups, 4), normal(tokens, heads, 4)]
    return row, None if past is None else (normal(past, groups, 6), normal(past, groups, 4))


def state_of(past, lengths):
    return None if past is None else {"k": past[0], "v": past[1], "length": torch.tensor(lengths)}


def truth(row, past, lengths, cu_seqlens, window):
    """Output and gradients of the whole row, in one process."""
    leaves = [x.clone().requires_grad_() for x in (*row[:3], *(past or ()))]
    state = state_of(leaves[3:], lengths) if past else None
    if state is not None and cu_seqlens is not None:
        # The state is the first document's.
        state["length"] = torch.tensor([*lengths, *[0] * (len(cu_seqlens) - 2)])
    out, _ = softmax_attention(*leaves[:3], window=window, initial_state=state, cu_seqlens=cu_seqlens)
    (out * row[3]).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def compare(row, offsets, *, group=None, documents=None, window=None, past=None, lengths=None, **options):
    """Asserts that this rank's outputs and gradients are those of the whole row; returns the state after it."""
    group, dtype = group or dist.group.WORLD, options.pop("dtype", torch.float64)
    rank = group.rank()
    own = slice(offsets[rank], offsets[rank + 1])
    cu_seqlens = None if documents is None else boundaries(documents)
    expected = truth(row, past, lengths, cu_seqlens, window)
    leaves = [x[:, own].clone().to(dtype).requires_grad_() for x in row[:3]]
    leaves += [x.clone().to(dtype).requires_grad_() for x in past or ()]
    sequence = ShardedSequence(
        group=group, offsets=offsets, cu_seqlens=cu_seqlens, backend=options.pop("backend", "auto")
    )
    state = state_of(leaves[3:], lengths) if past else None
    out, state = sequence.run(softmax_attention, *leaves[:3], initial_state=state, window=window, **options)
    assert out.dtype == dtype
    (out * row[3][:, own].to(dtype)).sum().backward()
    names = ("out", "q", "k", "v", "past k", "past v")
    for name, came, whole in zip(names, [out, *(x.grad for x in leaves)], expected, strict=False):
        true = whole[:, own]
        if name.startswith("past"):
            true = whole if rank == 0 else torch.zeros_like(whole)
        if came is None:
            assert true.numel() == 0, f"{name} has no gradient on rank {rank}"
            continue
        # Against the whole row's norm: a query that sees one key alone has no gradient to compare with. Where all do,
        # what q and k have is rounding, which is measured by the gradient of v.
        scale = expected[3] if window == 1 and name in ("q", "k") else whole
        error = (came - true).norm() / scale.norm()
        what = f"{offsets} {documents} window={window} {options} rank {rank}: {name} is off by {error:.2e}"
        assert error < TOLERANCES[dtype], what
    return state


def full(rank, ranks, heads, groups, form):
    row, _ = random_inputs(heads, groups)
    for offsets, documents in product(OFFSETS[ranks], DOCUMENTS.values()):
        compare(row, offsets, documents=documents, form=form)


def quick_on_three(*cases):
    """Parameters of which those of three ranks are in the quick loop."""
    return [pytest.param(*case, marks=() if case[0] == 3 else pytest.mark.all) for case in cases]


@pytest.mark.parametrize(
    ("ranks", "heads", "groups", "form"),
    quick_on_three(
        *((2, 4, 2, "heads"), (3, 6, 3, "heads"), (4, 8, 4, "heads")),
        *((2, 3, 3, "auto"), (3, 6, 2, "auto"), (4, 2, 1, "auto")),
    ),
)
def test_full_attention_equals_one_process(ranks, heads, groups, form):
    run_ranks(ranks, full, ranks, heads, groups, form)


def windows(rank, ranks):
    row, _ = random_inputs(4, 2)
    for offsets, documents, window in product(OFFSETS[ranks], DOCUMENTS.values(), (1, 2, 5, 16, 40)):
        compare(row, offsets, documents=documents, window=window)


@pytest.mark.parametrize("ranks", quick_on_three((2,), (3,), (4,)))
def test_windows_equal_one_process(ranks):
    run_ranks(ranks, windows, ranks)


@on_ranks(3)
def test_float32_rows_and_the_definition(rank):
    row, _ = random_inputs(6, 3)
    for offsets, options in product(OFFSETS[3], ({"form": "heads"}, {"form": "blocks"}, {"window": 5})):
        compare(row, offsets, documents=DOCUMENTS["long"], dtype=torch.float32, **options)
        compare(row, offsets, documents=DOCUMENTS["long"], backend="reference", **options)
        compare(random_inputs(6, 3, batch=2)[0], offsets, scale=6**-0.5, **options)


@on_ranks(3)
def test_states_before_the_row(rank):
    forms = ({"form": "heads"}, {"form": "blocks"}, {"window": 14})
    for offsets, rows in product(OFFSETS[3], (3, 13)):
        row, past = random_inputs(6, 3, past=rows)
        for documents, options in product(DOCUMENTS.values(), forms):
            compare(row, offsets, documents=documents, past=past, lengths=[rows], **options)
        row, past = random_inputs(6, 3, past=rows, batch=2)
        compare(row, offsets, past=past, lengths=[rows, 1], window=14)
        with pytest.raises(ValueError, match="on several ranks it must be"):
            compare(row, offsets, past=past, lengths=[rows, 1])


@on_ranks(3)
def test_states_after_each_rank(rank):
    row, past = random_inputs(4, 2, past=3)
    _, k, v, _ = row
    for offsets, documents in product(OFFSETS[3], DOCUMENTS.values()):
        start, end = offsets[rank : rank + 2]
        state = compare(row, offsets, documents=documents, window=9, past=past, lengths=[3])
        first = max([0, *([] if documents is None else [x for x in boundaries(documents).tolist() if x < end])])
        count = min(8, end - first + (0 if first else 3))
        assert state["length"].tolist() == [count]
        for name, old, new in zip("kv", past, (k, v), strict=True):
            expected = torch.cat([old, new[:, :end]], 1)
            assert torch.equal(state[name][:, state[name].shape[1] - count :], expected[:, expected.shape[1] - count :])
        assert state["k"].shape[1] == (8 if documents is None else count)
        own = compare(row, offsets, documents=documents)
        held = end - max(first, start) if end > start else 0
        assert torch.equal(own["k"], k[:, end - held : end])
        assert own["length"].tolist() == [held]


@on_ranks(4)
def test_ranks_of_a_group_are_not_ranks_of_the_world(rank):
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 17}):
            compare(random_inputs(4, 2)[0], (0, 12, 29), group=group, documents=DOCUMENTS["long"], **options)


@on_ranks(3)
def test_documents_do_not_see_each_other(rank):
    """The next document's outputs and gradients are bit-equal when the last token of the one before changes."""
    offsets = (0, 7, 15, 29)
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=offsets, cu_seqlens=boundaries([4, 13, 12]))
    own = slice(offsets[rank], offsets[rank + 1])
    others = [position - own.start for position in range(own.start, own.stop) if not 4 <= position < 17]
    row, _ = random_inputs(3, 3)
    changed = 0
    for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 13}):
        results = []
        for change in (0.0, 100.0):
            leaves = [x[:, own].clone() for x in row[:3]]
            if own.start <= 16 < own.stop:
                for leaf in leaves:
                    leaf[:, 16 - own.start] += change
            for leaf in leaves:
                leaf.requires_grad_()
            out, _ = sequence.run(softmax_attention, *leaves, **options)
            (out * row[3][:, own]).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for before, after in zip(*results, strict=True):
            assert torch.equal(before[:, others], after[:, others])
            changed += not torch.equal(before, after)
    # On the token's own rank all has changed, on the others the gradients of the keys and values it sees.
    assert changed == (6, 6, 12)[rank]


def counted(rank, other):
    """`other` makes another form of a function, which must give the same and communicate as often."""
    group, offsets = dist.group.WORLD, (0, 21, 29)
    sequence, own = ShardedSequence(group=group, offsets=offsets), slice(offsets[rank], offsets[rank + 1])
    plan = HaloPlan((0, 0), offsets)
    row, _ = random_inputs(4, 4)

    def layer(q, k, v, form):
        q, k, v = q.sin(), k.cos(), v.exp()
        if form == "operator":
            head = q if rank else q[:, :0]
            out = block_attention(head, k, v, scale=0.3, fused=False, plan=plan, group=group)
        elif form == "halo":
            out = left_halo(v, plan, group=group).sum(1, keepdim=True) * q[..., :4]
        else:
            options = {"window": 8} if form == "window" else {"form": form}
            out, _ = sequence.run(softmax_attention, q, k, v, **options)
        return out.tanh().sum()

    forms = ("operator", "halo") if other is compiled else ("heads", "blocks", "window")
    for form in forms:
        results, counts = [], []
        for run in (layer, other(layer)):
            leaves = [x[:, own].clone().requires_grad_() for x in row[:3]]
            before = engine_of(group.group_name).exchanges
            out = run(*leaves, form)
            forward = engine_of(group.group_name).exchanges
            out.backward()
            counts.append((forward - before, engine_of(group.group_name).exchanges - forward))
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            results.append([out.detach(), *grads])
        messages = 2 if form in ("heads", "window") else 1
        assert counts == [(messages, messages)] * 2, f"{form}: as many exchanges backward as forward, none repeated"
        for plain, came in zip(*results, strict=True):
            torch.testing.assert_close(plain, came, rtol=1e-12, atol=1e-12)


def checkpointed(function):
    return partial(checkpoint, function, use_reentrant=False, context_fn=checkpoint_contexts)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.all
def test_activation_checkpointing_repeats_no_exchange():
    run_ranks(2, counted, checkpointed)


@pytest.mark.all
@pytest.mark.timeout(120)
def test_messages_compile_as_one_graph():
    run_ranks(2, counted, compiled, limit=100)


@on_ranks(3)
def test_a_rank_without_loss_returns_gradients(rank):
    """A rank whose tokens count for nothing still takes part in backward."""
    offsets = (0, 11, 21, 29)
    own = slice(offsets[rank], offsets[rank + 1])
    row, _ = random_inputs(3, 3)
    row[3][:, 11:21] = 0
    for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 8}):
        compare(row, offsets, **options)
    leaves = [x[:, own].clone().requires_grad_() for x in row[:3]]
    out, _ = ShardedSequence(group=dist.group.WORLD, offsets=offsets).run(softmax_attention, *leaves)
    (out.sum() * 0 if rank == 1 else (out * row[3][:, own]).sum()).backward()
    expected = truth(row, None, None, None, None)
    for came, true in zip((leaf.grad for leaf in leaves), expected[1:], strict=True):
        torch.testing.assert_close(came, true[:, own])


@on_ranks(2)
def test_short_documents_go_by_blocks(rank):
    """Documents that hardly reach to the left need one round of blocks, not two of heads."""
    row, engine = random_inputs(4, 2)[0], engine_of(dist.group.WORLD.group_name)
    for documents, rounds in (([14, 15], 1), ([12, 17], 1), ([10, 19], 2)):
        before = engine.exchanges
        compare(row, (0, 15, 29), documents=documents)
        assert (engine.exchanges - before) // 2 == rounds


@on_ranks(2)
def test_form_by_heads_needs_heads(rank):
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 29, 29))
    with pytest.raises(ValueError, match="H=3 and G=3 heads on 2 ranks"):
        sequence.run(softmax_attention, *random_inputs(3, 3)[0][:3], form="heads")
