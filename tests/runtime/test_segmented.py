"""A row run segment by segment: the loss and gradients of the row in one piece, or truncated as it says."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.data import Batch
from seqtrain.data.batches import even_offsets, places_of
from seqtrain.models.shared import SharedConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.testing import run_ranks
from seqtrain.runtime import segmented
from seqtrain.runtime.evaluation import _score
from seqtrain.runtime.segmented import Segment, segment_losses
from seqtrain.testing import relative_error
from tests.models.tiny import LAYERS, assert_same_gradients, build, row
from tests.parallel.shard_cases import Cut

# Five segments are cut at 40, 80, 120 and 160: at a boundary of documents, within a long one, just after one that is
# shorter than any convolution, just before one.
ROW = Cut((0, 201), (0, 13, 14, 40, 119, 161, 201))
ONE = Cut((0, 150), (0, 150))
HYBRID = ("gated_delta_net", "sliding_attention", "s5", "attention", "rwkv6")
SHARED = SharedConfig(layers=(0, 1, 1, 0, 0), adapter_rank=3)
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def batch_of(cut, segments, *, part=0, parts=1):
    """What one of `parts` ranks reads of a row in segments."""
    tokens, labels = row(cut)
    offsets = even_offsets(cut.tokens, segments * parts)
    tokens, labels = (
        torch.cat([x[:, own.start : own.stop] for own in places_of(offsets, part, parts)], 1) for x in (tokens, labels)
    )
    return Batch(tokens, labels, offsets, cut.cu_seqlens)


def pieces_of(cut, *, segments=5):
    """A row of documents as segments."""
    return segmented.cut(batch_of(cut, segments), group=None, backend="auto")


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters()}


def in_one_piece(model, cut=ROW):
    model.zero_grad()
    loss = model(*row(cut), sequence=SequenceContext(cut.cu_seqlens))
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(came, truth, limit=EXACT[torch.float64], **options):
    assert_same_gradients(came, truth, limit, **options)


def streamed(model, cut=ROW, *, segments=5, mode="exact", scale=1.0):
    return run(model, pieces_of(cut, segments=segments), mode, scale)


def run(model, pieces, mode, scale=1.0):
    model.zero_grad()
    losses = []
    for loss in segment_losses(model, pieces, mode):
        if loss is not None:
            (scale * loss).backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum(), gradients(model)


def on_ranks(builds, *, cut=ROW, segments=3, ranks=2, mode="exact"):
    """Losses and gradients of models, all ranks together, whose segments are shared by ranks."""

    def on_rank(rank):
        group, found = dist.group.WORLD, []
        for build_model in builds:
            pieces = segmented.cut(batch_of(cut, segments, part=rank, parts=ranks), group=group, backend="auto")
            loss, grads = run(build_model(), pieces, mode)
            for tensor in (loss, *grads.values()):
                dist.all_reduce(tensor)
            found.append((loss, grads))
        return found

    return run_ranks(ranks, on_rank)[0]


@pytest.mark.all
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_exact_gradients_are_those_of_the_row_in_one_piece(layers):
    model = build(layers).double()
    assert_same(streamed(model), in_one_piece(model))


@pytest.mark.all
def test_float32():
    model = build(LAYERS["recurrent"] + LAYERS["with attention"])
    assert_same(streamed(model), in_one_piece(model), EXACT[torch.float32])


@pytest.mark.parametrize(
    ("cut", "segments"), [(ROW, 1), (ROW, 3), (ROW, 11), (Cut((0, 12), (0, 5, 12)), 12)], ids=["1", "3", "11", "tokens"]
)
def test_any_number_of_segments(cut, segments):
    model = build(HYBRID).double()
    assert_same(streamed(model, cut, segments=segments), in_one_piece(model, cut))


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": (7, 0, 64)},
        {"activation_checkpointing": True, "shared": SHARED},
        {"recompute": ("norm", "projection")},
    ],
    ids=str,
)
def test_groups_of_tokens_and_recomputed_blocks(fields):
    model = build(HYBRID, **fields).double()
    assert_same(streamed(model), in_one_piece(model))


def test_gradients_that_arrive_are_not_scaled_again():
    """As an engine does that divides each backward pass by their number."""
    model = build(HYBRID).double()
    assert_same(streamed(model, scale=0.25), in_one_piece(model), scale=0.25)


@pytest.mark.all
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_truncated_gradients_are_those_with_detached_states(layers):
    model = build(layers).double()
    tokens, labels = row(ONE)
    state, total = None, torch.zeros((), dtype=torch.float64)
    model.zero_grad()
    for piece, target in zip(tokens.split(50, 1), labels.split(50, 1), strict=True):
        loss, state = model(piece, target, state, keep_state=True)
        total = total + loss
        state = [{name: part.detach() for name, part in layer.items()} for layer in state]
    total.backward()
    truth = total.detach(), gradients(model)
    exact = streamed(model, ONE, segments=3)
    truncated = streamed(model, ONE, segments=3, mode="truncated")
    assert_same(truncated, truth)
    assert relative_error(exact[0], truncated[0]) < EXACT[torch.float64]
    assert any(relative_error(exact[1][name], gradient) > 1e-6 for name, gradient in truncated[1].items())


# Two in the tier `all`: every kind of state, short documents; the grid of mixers in `full`.
SHARED_OVER_RANKS = [
    pytest.param([{"layers": HYBRID}, {"layers": HYBRID, "groups": (7, 0, 64)}], 2, marks=pytest.mark.all),
    pytest.param([{"layers": layers} for layers in LAYERS.values()], 2, marks=pytest.mark.full),
    pytest.param([{"layers": layers} for layers in LAYERS.values()], 3, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("models", "ranks"), SHARED_OVER_RANKS, ids=["two", "of 2 ranks", "of 3 ranks"])
@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_segments_that_ranks_share(models, ranks, mode):
    builds = [lambda fields=fields: build(**fields).double() for fields in models]
    for build_model, came, fields in zip(builds, on_ranks(builds, ranks=ranks, mode=mode), models, strict=True):
        expected = streamed(build_model(), segments=3, mode=mode)
        assert_same(came, expected, what=str(fields))


def test_truncated_documents_know_nothing_of_each_other():
    model = build(HYBRID).double()
    apart = Cut((0, 120), (0, 40, 80, 120))
    assert_same(streamed(model, apart, segments=3, mode="truncated"), in_one_piece(model, apart))


@pytest.mark.parametrize(("mode", "count"), [("exact", 9), ("truncated", 5)])
def test_every_pass_is_told(mode, count):
    told = list(segment_losses(build(("gla",)), pieces_of(ROW), mode))
    assert len(told) == segmented.passes(5, mode) == count
    assert sum(loss is not None for loss in told) == 5


@pytest.mark.parametrize("boundaries", [(0, 120), (0, 40, 80, 120), (0, 40, 50, 120)], ids=str)
def test_runs_are_as_many_whatever_the_documents(monkeypatch, boundaries):
    """Ranks that run the model together, as in ZeRO-3, have different documents."""
    model, calls = build(("gla",)), []
    run = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: calls.append(torch.is_grad_enabled()) or run(*a, **k))
    streamed(model, Cut((0, 120), boundaries), segments=3)
    assert calls == [False] * 2 + [True] * 3


@torch.no_grad()
def test_answers_are_scored_as_in_one_piece():
    model, pieces = build(HYBRID).double(), pieces_of(ROW)
    assert [piece.sequence.continues for piece in pieces] == [False, False, True, True, True]
    boundaries = [[0, 13, 14, 40], [0, 40], [0, 39, 40], [0, 40], [0, 1, 41]]
    assert [piece.sequence.cu_seqlens.tolist() for piece in pieces] == boundaries
    whole = [Segment(*row(ROW), SequenceContext(ROW.cu_seqlens))]
    for answers in (False, True):
        expected = _score(model, whole, answers=answers)
        assert _score(model, pieces, answers=answers) == pytest.approx(expected, rel=EXACT[torch.float64])
