"""Softmax attention over ranks, windows with sinks too, against one process: outputs, states and gradients."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from seqtrain.kernels import sink_attention, softmax_attention
from seqtrain.parallel import ShardedSequence, checkpoint_contexts, relay
from seqtrain.parallel.halo import HaloPlan, left_halo
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.testing import RankError, run_ranks
from seqtrain.testing import boundaries
from tests.parallel.ranks import on_ranks
from tests.parallel.shard_cases import (
    CUTS,
    Cut,
    OperatorCase,
    assert_nothing_leaks,
    assert_same_as_whole,
    assert_same_rows,
)

TOKENS = 29
# Documents in a row of 29 tokens: none but the row; over three ranks; starts at cuts, one empty; many short ones.
DOCUMENTS = {"whole": None, "long": [2, 21, 6], "at cuts": [7, 8, 0, 14], "short": [1, 3, 2, 5, 4, 1, 1, 6, 3, 3]}
OFFSETS = {
    2: [(0, 14, 29), (0, 0, 29), (0, 28, 29)],
    3: [(0, 7, 15, 29), (0, 1, 2, 29), (0, 12, 12, 29), (0, 20, 29, 29)],
    4: [(0, 7, 8, 22, 29), (0, 0, 11, 11, 29), (0, 3, 15, 16, 29)],
}


def case_of(heads, groups, *, batch=1, past=None, lengths=None, dtype=torch.float64, backend="auto", **options):
    """q, k, v of K=6, V=4 and, for `past` rows, an initial state."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows, *shape):
        return torch.randn(batch, rows, *shape, dtype=torch.float64, generator=generator).to(dtype)

    tensors = {"q": normal(TOKENS, heads, 6), "k": normal(TOKENS, groups, 6), "v": normal(TOKENS, groups, 4)}
    state = None
    if past is not None:
        state = {"k": normal(past, groups, 6), "v": normal(past, groups, 4)}
        state["length"] = torch.tensor(lengths or [past] * batch)
    return OperatorCase(softmax_attention, tensors, options, state, final=False, backend=backend)


def cuts(ranks, names=DOCUMENTS):
    edges = {name: DOCUMENTS[name] and tuple(boundaries(DOCUMENTS[name]).tolist()) for name in names}
    return [Cut(offsets, edges[name]) for offsets in OFFSETS[ranks] for name in names]


def agree(cuts, *cases, **options):
    """Outputs and gradients of every case on every cut are those of one process."""
    rows = {f"{number} {case.options} {cut}": (case, cut) for number, case in enumerate(cases) for cut in cuts}
    assert_same_rows(rows, **options)


def quick_on_three(*cases):
    """Parameters of which those of three ranks are in the quick loop."""
    return [pytest.param(*case, marks=() if case[0] == 3 else pytest.mark.all) for case in cases]


@pytest.mark.parametrize(
    ("ranks", "heads", "groups", "form"),
    quick_on_three(
        *((2, 4, 2, "heads"), (3, 6, 3, "heads"), (4, 8, 4, "heads")),
        *((2, 3, 3, "blocks"), (3, 6, 2, "auto"), (4, 2, 1, "blocks")),
        *((3, 3, 1, (1, True)), (4, 4, 2, (2, True)), (4, 4, 2, (2, False)), (4, 2, 1, (1, True))),
    ),
)
def test_full_attention_equals_one_process(ranks, heads, groups, form):
    agree(cuts(ranks), case_of(heads, groups, form=form))


@pytest.mark.parametrize("ranks", quick_on_three((2,), (3,), (4,)))
def test_windows_equal_one_process(ranks):
    agree(cuts(ranks), *(case_of(4, 2, window=window) for window in (1, 2, 5, 16, 40)))


FORMS = ({"form": "heads"}, {"form": "blocks"}, {"form": (1, True)}, {"window": 14})


@pytest.mark.all
def test_float32_rows_and_the_definition():
    agree(cuts(3, ["long"]), *(case_of(6, 3, dtype=torch.float32, **options) for options in FORMS), limit=1e-5)
    cases = [case_of(6, 3, backend="reference", **options) for options in FORMS]
    agree(cuts(3, ["long"]), *cases)
    scores = {"scale": 0.6, "score_cap": 0.8}
    agree(cuts(3, ["whole"]), *(case_of(6, 3, batch=2, **scores, **options) for options in FORMS))


@pytest.mark.all
def test_states_before_the_row():
    for rows in (3, 13):
        agree(cuts(3), *(case_of(6, 3, past=rows, **options) for options in FORMS))
        agree(cuts(3, ["whole"]), case_of(6, 3, past=rows, lengths=[rows, 1], batch=2, window=14))
    with pytest.raises(RankError, match="on several ranks it must be"):
        agree(cuts(3, ["whole"]), case_of(6, 3, past=3, lengths=[3, 1], batch=2))


@pytest.mark.all
def test_ranks_of_a_group_are_not_ranks_of_the_world():
    cut = Cut((0, 12, 29), tuple(boundaries(DOCUMENTS["long"]).tolist()))
    agree([cut], *(case_of(4, 2, **options) for options in FORMS), members=[1, 3])


@pytest.mark.all
def test_documents_do_not_see_each_other():
    cases = {str(options): case_of(3, 3, **options) for options in FORMS}
    assert_nothing_leaks(cases, Cut((0, 7, 15, 29), (0, 17, 29)), 16)


@on_ranks(3)
def test_states_after_each_rank(rank):
    past = case_of(4, 2, past=3)
    for cut in cuts(3):
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
        start, end = cut.offsets[rank : rank + 2]
        parts = [x[:, start:end] for x in past.tensors.values()]
        _, state = sequence.run(softmax_attention, *parts, initial_state=past.initial_state, window=9)
        first = max([0, *(x for x in cut.boundaries or () if x < end)])
        count = min(8, end - first + (0 if first else 3))
        assert state["length"].tolist() == [count]
        for name in "kv":
            expected = torch.cat([past.initial_state[name], past.tensors[name][:, :end]], 1)
            assert torch.equal(state[name][:, state[name].shape[1] - count :], expected[:, expected.shape[1] - count :])
        assert state["k"].shape[1] == (8 if cut.boundaries is None else count)
        _, own = sequence.run(softmax_attention, *parts)
        held = end - max(first, start) if end > start else 0
        assert torch.equal(own["k"], past.tensors["k"][:, end - held : end])
        assert own["length"].tolist() == [held]


def counted(rank, other):
    """`other` makes another form of a function, which must give the same and communicate as often."""
    group, offsets = dist.group.WORLD, (0, 21, 29)
    sequence, own = ShardedSequence(group=group, offsets=offsets), slice(offsets[rank], offsets[rank + 1])
    plan = HaloPlan((0, 0), offsets)
    row = list(case_of(4, 4).tensors.values())

    def layer(q, k, v, form):
        q, k, v = q.sin(), k.cos(), v.exp()
        if form == "halo":
            out = left_halo(v, plan, group=group).sum(1, keepdim=True) * q[..., :4]
        else:
            options = {"window": 8} if form == "window" else {"form": form}
            out, _ = sequence.run(softmax_attention, q, k, v, **options)
        return out.tanh().sum()

    messages = {"halo": 1} if other is compiled else {"window": 2}
    for form, expected in (messages | {"blocks": 1, "heads": 2, (1, True): 3}).items():
        results, counts = [], []
        for run in (layer, other(layer)):
            leaves = [x[:, own].clone().requires_grad_() for x in row]
            before = engine_of(group.group_name).exchanges
            out = run(*leaves, form)
            forward = engine_of(group.group_name).exchanges
            out.backward()
            counts.append((forward - before, engine_of(group.group_name).exchanges - forward))
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            results.append([out.detach(), *grads])
        assert counts == [(expected, expected)] * 2, f"{form}: as many exchanges backward as forward, none repeated"
        for plain, came in zip(*results, strict=True):
            torch.testing.assert_close(plain, came, rtol=1e-12, atol=1e-12)


def checkpointed(function):
    return partial(checkpoint, function, use_reentrant=False, context_fn=checkpoint_contexts)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


class Held(TorchDispatchMode):
    """Counts the bytes of what was made while it was in force and is there yet, beside what was `known`."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.made = {x.untyped_storage()._cdata for x in known}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = weakref.ref(storage)
        return out

    @property
    def bytes(self):
        gc.collect()
        there = {storage._cdata: storage.nbytes() for made in self.made.values() if (storage := made()) is not None}
        return sum(there.values())


@on_ranks(2)
def test_recomputation_keeps_output_and_sums_alone(rank):
    """Whatever the form: not one number that came from another rank. The gradients are the same bits."""
    torch.manual_seed(rank)
    tokens, heads, groups, width = 64, 4, 2, 8
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, tokens, 2 * tokens))
    x = torch.randn(1, tokens, width)
    weights = torch.randn(width, (heads + 2 * groups) * width)
    out, sums = 4 * tokens * heads * width, 4 * tokens * heads
    for form in ("heads", "blocks", (1, True)):

        def layer(weights, form=form):
            q, k, v = (x @ weights).unflatten(2, (-1, width)).split([heads, groups, groups], 2)
            return sequence.run(softmax_attention, q, k, v, form=form)[0].sin().sum()

        found = []
        for run, kept in ((layer, None), (checkpointed(layer), out + sums)):
            leaf = weights.clone().requires_grad_()
            with Held(x, leaf) as held:
                loss = run(leaf)
                assert kept is None or held.bytes <= kept + 64, form
            loss.backward()
            found.append(leaf.grad)
        assert torch.equal(*found), form


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
    weight = torch.linspace(-1, 1, TOKENS, dtype=torch.float64)[None, :, None, None].clone()
    weight[:, 11:21] = 0
    for options in FORMS:
        row = list(case_of(3, 3).tensors.values())
        whole = [x.clone().requires_grad_() for x in row]
        (softmax_attention(*whole, window=options.get("window"))[0] * weight).sum().backward()
        parts = [x[:, own].clone().requires_grad_() for x in row]
        out, _ = ShardedSequence(group=dist.group.WORLD, offsets=offsets).run(softmax_attention, *parts, **options)
        (out.sum() * 0 if rank == 1 else (out * weight[:, own]).sum()).backward()
        for came, true in zip(parts, whole, strict=True):
            torch.testing.assert_close(came.grad, true.grad[:, own])


@on_ranks(2)
def test_form_by_heads_needs_heads(rank):
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=(0, 29, 29))
    with pytest.raises(ValueError, match="H=3 and G=3 heads on 2 ranks: groups of 2"):
        sequence.run(softmax_attention, *case_of(3, 3).tensors.values(), form="heads")


HEADS, GROUPS, KEY, VALUE = 4, 2, 6, 5
# Windows and sinks, each shorter and longer than some rank's tokens.
REACHES = [(1, 3), (90, 7), (20, 0), (3, 80)]


def sink_cases(cut, *, lengths=None, batch=1, reaches=REACHES):
    """Every reach on a row; `lengths`: how many tokens came before each row of the batch."""
    generator = torch.Generator().manual_seed(0)

    def normal(tokens, *shape, batch=batch):
        return torch.randn(batch, tokens, *shape, generator=generator, dtype=torch.float64)

    def past(**reach):
        shapes = (HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE)
        rows = ([normal(tokens, *shape, batch=1) for shape in shapes] for tokens in lengths)
        states = [sink_attention(*row, **reach)[1] for row in rows]
        return {key: torch.cat([state[key] for state in states]) for key in states[0]}

    shapes = {"q": (HEADS, KEY), "k": (GROUPS, KEY), "v": (GROUPS, VALUE)}
    shapes |= {"extra_score": (HEADS,), "extra_value": (HEADS, VALUE)}
    tensors = {name: normal(cut.tokens, *shape) for name, shape in shapes.items()}
    cases = {}
    for window, sinks in reaches:
        reach = {"window": window, "sinks": sinks}
        cases[f"{window} {sinks}"] = OperatorCase(sink_attention, tensors, reach, past(**reach) if lengths else None)
    return cases


def sinks_agree(cut, lengths, *, batch=1):
    assert_same_as_whole(sink_cases(cut, lengths=lengths, batch=batch), cut, limit=1e-11)


MORE = [*itertools.product(CUTS, [None]), *itertools.product(["one document", "empty ranks", "few tokens"], [2])]
MORE += [("across three ranks", 40), ("empty ranks", 40), ("one document", 0)]


@pytest.mark.parametrize(
    ("cut", "before"), [("uneven", 2), *(pytest.param(*case, marks=pytest.mark.all) for case in MORE)]
)
def test_a_sharded_row_gives_what_the_whole_one_gives(cut, before):
    sinks_agree(CUTS[cut], None if before is None else [before])


@pytest.mark.all
@pytest.mark.parametrize("lengths", [None, [1, 30]])
def test_rows_of_a_batch_have_sinks_of_their_own(lengths):
    """With pasts of different lengths their sinks fill up at different tokens."""
    sinks_agree(Cut((0, 1, 4, 31), None), lengths, batch=2)


@pytest.mark.all
def test_ranks_do_not_wait_for_each_other(monkeypatch):
    """The operator runs at once on every rank: its state is not handed on."""

    def refuse(*unused):
        raise AssertionError("relayed")

    monkeypatch.setattr("seqtrain.parallel.relay._pass_on", refuse)
    monkeypatch.setattr(relay, "_receive", refuse)
    sinks_agree(CUTS["one document"], None)


@pytest.mark.all
def test_nothing_leaks_from_a_window_with_sinks():
    cut = Cut((0, 20, 43, 60), (0, 25, 60))
    assert_nothing_leaks(sink_cases(cut, reaches=[(6, 30)]), cut, 24)
