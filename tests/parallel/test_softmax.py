"""Softmax attention over ranks against one process: outputs, states and the gradients of q, k and v on every rank."""

from functools import partial

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


def compare(
    row,
    offsets,
    group,
    *,
    documents=None,
    window=None,
    past=None,
    lengths=None,
    dtype=torch.float64,
    backend="auto",
    **options,
):
    rank = group.rank()
    own = slice(offsets[rank], offsets[rank + 1])
    cu_seqlens = None if documents is None else boundaries(documents)
    expected = truth(row, past, lengths, cu_seqlens, window)
    leaves = [x[:, own].clone().to(dtype).requires_grad_() for x in row[:3]]
    leaves += [x.clone().to(dtype).requires_grad_() for x in past or ()]
    sequence = ShardedSequence(group=group, offsets=offsets, cu_seqlens=cu_seqlens, backend=backend)
    state = state_of(leaves[3:], lengths) if past else None
    out, state = sequence.run(softmax_attention, *leaves[:3], initial_state=state, window=window, **options)
    assert out.dtype == dtype
    (out * row[3][:, own].to(dtype)).sum().backward()
    for name, came, whole in zip(
        ("out", "q", "k", "v", "past k", "past v"), [out, *(x.grad for x in leaves)], expected, strict=False
    ):
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
    for offsets in OFFSETS[ranks]:
        for documents in DOCUMENTS.values():
            compare(row, offsets, dist.group.WORLD, documents=documents, form=form)


@pytest.mark.parametrize(
    ("ranks", "heads", "groups", "form"),
    [
        pytest.param(2, 4, 2, "heads", marks=pytest.mark.all),
        (3, 6, 3, "heads"),
        pytest.param(4, 8, 4, "heads", marks=pytest.mark.all),
        pytest.param(2, 3, 3, "auto", marks=pytest.mark.all),
        (3, 6, 2, "auto"),
        pytest.param(4, 2, 1, "auto", marks=pytest.mark.all),
    ],
)
def test_full_attention_equals_one_process(ranks, heads, groups, form):
    run_ranks(ranks, full, ranks, heads, groups, form)


def windows(rank, ranks):
    row, _ = random_inputs(4, 2)
    for offsets in OFFSETS[ranks]:
        for documents in DOCUMENTS.values():
            for window in (1, 2, 5, 16, 40):
                compare(row, offsets, dist.group.WORLD, documents=documents, window=window)


@pytest.mark.parametrize(
    "ranks", [pytest.param(ranks, marks=() if ranks == 3 else pytest.mark.all) for ranks in (2, 3, 4)]
)
def test_windows_equal_one_process(ranks):
    run_ranks(ranks, windows, ranks)


def other_settings(rank, ranks):
    group = dist.group.WORLD
    row, _ = random_inputs(6, 3)
    for offsets in OFFSETS[ranks]:
        for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 5}):
            compare(row, offsets, group, documents=DOCUMENTS["long"], dtype=torch.float32, **options)
            compare(row, offsets, group, documents=DOCUMENTS["long"], backend="reference", **options)
            compare(random_inputs(6, 3, batch=2)[0], offsets, group, scale=6**-0.5, **options)


@pytest.mark.all
def test_float32_rows_and_the_definition():
    run_ranks(3, other_settings, 3)


def given_states(rank, ranks):
    group = dist.group.WORLD
    for offsets in OFFSETS[ranks]:
        for rows in (3, 13):
            row, past = random_inputs(6, 3, past=rows)
            for documents in DOCUMENTS.values():
                for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 14}):
                    compare(row, offsets, group, documents=documents, past=past, lengths=[rows], **options)
            row, past = random_inputs(6, 3, past=rows, batch=2)
            compare(row, offsets, group, past=past, lengths=[rows, 1], window=14)
            with pytest.raises(ValueError, match="on several ranks it must be"):
                compare(row, offsets, group, past=past, lengths=[rows, 1])


@pytest.mark.all
def test_states_before_the_row():
    run_ranks(3, given_states, 3)


def final_states(rank, ranks):
    row, past = random_inputs(4, 2, past=3)
    _, k, v, _ = row
    for offsets in OFFSETS[ranks]:
        start, end = offsets[rank : rank + 2]
        for documents in DOCUMENTS.values():
            state = compare(row, offsets, dist.group.WORLD, documents=documents, window=9, past=past, lengths=[3])
            first = max([0, *([] if documents is None else [x for x in boundaries(documents).tolist() if x < end])])
            keys, values = (torch.cat([old, new[:, :end]], 1) for old, new in zip(past, (k, v), strict=True))
            count = min(8, end - first + (0 if first else 3))
            assert state["length"].tolist() == [count]
            assert torch.equal(state["k"][:, state["k"].shape[1] - count :], keys[:, keys.shape[1] - count :])
            assert torch.equal(state["v"][:, state["v"].shape[1] - count :], values[:, values.shape[1] - count :])
            assert state["k"].shape[1] == (8 if documents is None else count)
            own = compare(row, offsets, dist.group.WORLD, documents=documents)
            held = end - max(first, start) if end > start else 0
            assert torch.equal(own["k"], k[:, end - held : end])
            assert own["length"].tolist() == [held]


@pytest.mark.all
def test_states_after_each_rank():
    run_ranks(3, final_states, 3)


# Ranks of the group are not ranks of the world.
def sub_group(rank):
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        row, _ = random_inputs(4, 2)
        for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 17}):
            compare(row, (0, 12, 29), group, documents=DOCUMENTS["long"], **options)


@pytest.mark.all
def test_a_group_that_is_not_the_world():
    run_ranks(4, sub_group)


def one_document_changed(rank, ranks):
    group, offsets = dist.group.WORLD, (0, 7, 15, 29)
    sequence = ShardedSequence(group=group, offsets=offsets, cu_seqlens=boundaries([4, 13, 12]))
    own = slice(offsets[rank], offsets[rank + 1])
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
        others = [position for position in range(own.start, own.stop) if not 4 <= position < 17]
        for before, after in zip(*results, strict=True):
            index = [position - own.start for position in others]
            assert torch.equal(before[:, index], after[:, index])
            changed += not torch.equal(before, after)
    return changed


# The next document's outputs and gradients are bit-equal when the last token of the one before changes.
@pytest.mark.all
def test_documents_do_not_see_each_other():
    # On the token's own rank all has changed, on the others the gradients of the keys and values it sees.
    assert run_ranks(3, one_document_changed, 3) == [6, 6, 12]


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


# A rank whose tokens count for nothing still takes part in backward.
def without_loss(rank, ranks):
    group, offsets = dist.group.WORLD, (0, 11, 21, 29)
    own = slice(offsets[rank], offsets[rank + 1])
    row, _ = random_inputs(3, 3)
    row[3][:, 11:21] = 0
    for options in ({"form": "heads"}, {"form": "blocks"}, {"window": 8}):
        compare(row, offsets, group, **options)
    leaves = [x[:, own].clone().requires_grad_() for x in row[:3]]
    out, _ = ShardedSequence(group=group, offsets=offsets).run(softmax_attention, *leaves)
    (out.sum() * 0 if rank == 1 else (out * row[3][:, own]).sum()).backward()
    expected = truth(row, None, None, None, None)
    for came, true in zip((leaf.grad for leaf in leaves), expected[1:], strict=True):
        torch.testing.assert_close(came, true[:, own])


@pytest.mark.all
def test_a_rank_without_loss_returns_gradients():
    run_ranks(3, without_loss, 3)


# Documents that hardly reach to the left need no exchange of everything: one round of blocks, not two of heads.
def chosen(rank):
    row, _ = random_inputs(4, 2)
    group = dist.group.WORLD
    counts = []
    for documents in ([14, 15], [12, 17], [10, 19]):
        before = engine_of(group.group_name).exchanges
        compare(row, (0, 15, 29), group, documents=documents)
        counts.append((engine_of(group.group_name).exchanges - before) // 2)
    return counts


@pytest.mark.all
def test_short_documents_go_by_blocks():
    assert run_ranks(2, chosen) == [[1, 1, 2]] * 2


@pytest.mark.all
def test_form_by_heads_needs_heads():
    def refused(rank):
        row, _ = random_inputs(3, 3)
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 29, 29))
        with pytest.raises(ValueError, match="H=3 and G=3 heads on 2 ranks"):
            sequence.run(softmax_attention, *row[:3], form="heads")

    run_ranks(2, refused)
