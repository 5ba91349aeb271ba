"""A row run segment by segment: the loss and gradients of the row in one piece, or truncated as it says."""

from itertools import pairwise

import pytest
import torch

from seqtrain.models.streaming import Segment, boundaries_within, stream_backward, stream_forward
from seqtrain.parallel.continued import ContinuedSequence
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import even_offsets
from seqtrain.testing import relative_error
from tests.models.cut_cases import LAYERS, build, row
from tests.parallel.shard_cases import Cut

# Five segments are cut at 40, 80, 120 and 160: at a boundary of documents, within a long one, just behind one that is
# shorter than any convolution, just before one.
ROW = Cut((0, 201), (0, 13, 14, 40, 119, 161, 201))
ONE = Cut((0, 150), (0, 150))
HYBRID = ("gated_delta_net", "sliding_attention", "s5", "attention", "rwkv6")
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def cut_in_time(tokens, labels, cu_seqlens, *, segments):
    """A packed row as segments whose lengths differ by one token at most."""
    found = []
    for first, last in pairwise(even_offsets(tokens.shape[1], segments)):
        sequence = ContinuedSequence.of(SequenceContext(boundaries_within(cu_seqlens, first, last)))
        held = slice(first, last)
        found.append(Segment.of(tokens[:, held], labels[:, held], cu_seqlens, first=first, sequence=sequence))
    return found


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters()}


def in_one_piece(model, cut=ROW):
    model.zero_grad()
    loss = model(*row(cut), sequence=SequenceContext(cut.cu_seqlens))
    loss.backward()
    return loss.detach(), gradients(model)


def streamed(model, cut=ROW, *, segments=5, mode="exact", scale=1.0, **options):
    model.zero_grad()
    pieces = cut_in_time(*row(cut), cut.cu_seqlens, segments=segments)
    loss = stream_backward(model, pieces, gradients=mode, backward=lambda loss: (scale * loss).backward(), **options)
    return loss, gradients(model)


def assert_same(came, truth, tolerance=EXACT[torch.float64], *, scale=1.0):
    assert relative_error(came[0], truth[0]) < tolerance
    largest = max(gradient.norm() for gradient in truth[1].values())
    for name, expected in truth[1].items():
        # A gradient that is zero but for rounding is held to the size of the others.
        error = (came[1][name] - scale * expected).norm()
        assert error < tolerance * scale * max(expected.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_exact_gradients_are_those_of_the_row_in_one_piece(layers):
    model = build(layers).double()
    assert_same(streamed(model), in_one_piece(model))


def test_float32():
    model = build(LAYERS["recurrent"] + LAYERS["with attention"])
    assert_same(streamed(model), in_one_piece(model), EXACT[torch.float32])


@pytest.mark.parametrize(
    ("cut", "segments"), [(ROW, 1), (ROW, 3), (ROW, 11), (Cut((0, 12), (0, 5, 12)), 12)], ids=["1", "3", "11", "tokens"]
)
def test_any_number_of_segments(cut, segments):
    model = build(HYBRID).double()
    assert_same(streamed(model, cut, segments=segments), in_one_piece(model, cut))


@pytest.mark.parametrize("fields", [{"groups": (7, 0, 64)}, {"activation_checkpointing": True}], ids=str)
def test_groups_of_tokens_and_recomputed_blocks(fields):
    model = build(HYBRID, **fields).double()
    assert_same(streamed(model), in_one_piece(model))


def test_gradients_that_arrive_are_not_scaled_again():
    """As an engine does that divides each backward pass by their number."""
    model = build(HYBRID).double()
    assert_same(streamed(model, scale=0.25), in_one_piece(model), scale=0.25)


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


def test_truncated_documents_know_nothing_of_each_other():
    model = build(HYBRID).double()
    apart = Cut((0, 120), (0, 40, 80, 120))
    assert_same(streamed(model, apart, segments=3, mode="truncated"), in_one_piece(model, apart))


@pytest.mark.parametrize(("mode", "runs"), [("exact", 9), ("truncated", 5)])
def test_runs_are_reported_as_they_are_done(mode, runs):
    seen = []
    streamed(build(("gla",)), mode=mode, done=lambda count, of: seen.append((count, of)))
    assert seen == [(count, runs) for count in range(1, runs + 1)]


@pytest.mark.parametrize("boundaries", [(0, 120), (0, 40, 80, 120), (0, 40, 50, 120)], ids=str)
def test_runs_are_as_many_whatever_the_documents(monkeypatch, boundaries):
    """Ranks that run the model together, as in ZeRO-3, have different documents."""
    model, calls = build(("gla",)), []
    run = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: calls.append(torch.is_grad_enabled()) or run(*a, **k))
    streamed(model, Cut((0, 120), boundaries), segments=3)
    assert calls == [False] * 2 + [True] * 3


def test_a_forward_pass_gives_the_logits_of_the_row_in_one_piece():
    model = build(HYBRID).double()
    tokens, labels = row(ROW)

    def run(segment, state, *, keep_state):
        logits, state = model(segment.tokens, state=state, sequence=segment.sequence, all_logits=True)
        assert not logits.requires_grad
        return logits, state if keep_state else None

    pieces = cut_in_time(tokens, labels, ROW.cu_seqlens, segments=5)
    assert [piece.continues for piece in pieces] == [False, False, True, True, True]
    assert [piece.sequence.cu_seqlens.tolist() for piece in pieces] == [
        [0, 13, 14, 40],
        [0, 40],
        [0, 39, 40],
        [0, 40],
        [0, 1, 41],
    ]
    with torch.no_grad():
        expected, _ = model(tokens, sequence=SequenceContext(ROW.cu_seqlens), all_logits=True)
    assert relative_error(torch.cat(list(stream_forward(run, pieces)), 1), expected) < EXACT[torch.float64]
