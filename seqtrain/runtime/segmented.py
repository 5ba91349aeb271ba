"""A packed row run through a model segment by segment: only one segment's activations exist at a time.

The state of every layer is carried from each segment to the next, so the loss is that of the row in one piece. For the
gradient there is a choice:

* exact: first the states at all boundaries between segments are found, without activations; then the segments are run
  from last to first, each from its kept state, and each passes the gradient of that state on to the one before. This
  is activation checkpointing in time: one more forward pass, and the boundaries' states are held.
* truncated: segments are run from first to last and no gradient crosses a boundary (truncated backpropagation through
  time, Williams and Peng 1990). One pass, and one state is held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.data.batches import Batch, even_offsets
from seqtrain.mixers import State
from seqtrain.parallel.sequence import ContinuedSequence, SequenceContext

Gradients = Literal["exact", "truncated"]
# States of all layers of a model, as `LanguageModel` takes and returns them.
States = list[State]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a packed row.

    `tokens`, `labels`: int64 `[1,T]`; -100 does not count. `sequence`: their documents, with states of one document.
    `continues`: whether the first token's document began in the segment before.
    """

    tokens: Tensor
    labels: Tensor
    sequence: SequenceContext
    continues: bool = False


def cut(batch: Batch, pieces: int, *, backend: str) -> list[Segment]:
    """A row that this process holds whole, as `pieces` segments whose lengths differ by one token at most."""
    found, starts = [], batch.cu_seqlens
    for first, last in pairwise(even_offsets(batch.tokens.shape[1], pieces)):
        inner = starts[(starts > first) & (starts < last)] - first
        boundaries = torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([last - first])]).to(torch.int32)
        sequence = ContinuedSequence.of(SequenceContext(boundaries, backend))
        continues = not bool((starts == first).any())
        found.append(Segment(batch.tokens[:, first:last], batch.labels[:, first:last], sequence, continues))
    return found


def passes(pieces: int, gradients: Gradients, *, whole: bool = False) -> int:
    """How many passes over a segment `segment_losses` makes for a row of so many."""
    return 2 * pieces if whole else pieces if gradients == "truncated" else 2 * pieces - 1


def segment_losses(
    model: Callable[..., Any], segments: Sequence[Segment], gradients: Gradients, *, whole: bool = False
) -> Iterator[Tensor | None]:
    """The loss of each segment, a float32 scalar summed over tokens; None for each pass that only finds a state.

    The caller runs the backward pass of a loss, scaled by the same factor each time, before it asks for the next; then
    the weights have the gradients of the row's loss, the sum of all. `model`: a `LanguageModel`, or what calls one.
    `whole`: every segment is run before the first loss, for what depends on the whole row.
    """
    if gradients == "exact":
        yield from _exact(model, segments, whole)
        return
    for _ in _states(model, segments if whole else ()):
        yield None
    state: States | None = None
    for segment in segments:
        past = state if segment.continues else None
        loss, after = model(segment.tokens, segment.labels, past, sequence=segment.sequence, keep_state=True)
        yield loss
        state = alone(after)


def _states(model: Callable[..., Any], segments: Sequence[Segment]) -> Iterator[States]:
    """The state after each segment, found without activations.

    Also where nothing continues it: with ZeRO-3, where each pass gathers weights, ranks with other documents would wait
    for this one.
    """
    state: States | None = None
    for segment in segments:
        with torch.no_grad():
            past = state if segment.continues else None
            _, after = model(segment.tokens, state=past, sequence=segment.sequence)
        state = alone(after)
        yield state


def _exact(model: Callable[..., Any], segments: Sequence[Segment], whole: bool) -> Iterator[Tensor | None]:
    # The state before each segment; None where nothing is carried into it.
    before: list[States | None] = [None]
    for done, state in enumerate(_states(model, segments if whole else segments[:-1]), 1):
        if done < len(segments):
            before.append(state if segments[done].continues else None)
        yield None
    arriving = None
    for segment in reversed(segments):
        past = before.pop()
        leaves = None
        if past is not None:
            leaves = tree_map(lambda part: part.requires_grad_(part.is_floating_point() or part.is_complex()), past)
        # The model is given dicts of its own: ZeRO-3 puts tensors that are no leaves into those that modules are given.
        given = None if leaves is None else [dict(layer) for layer in leaves]
        loss, after = model(segment.tokens, segment.labels, given, sequence=segment.sequence, keep_state=True)
        yield loss if arriving is None else _with_gradients(loss, after, arriving)
        arriving = None if leaves is None else tree_map(lambda leaf: leaf.grad, leaves)


def alone(states: States) -> States:
    """The states without their graph, and without the larger tensors they may be views of."""
    return tree_map(lambda part: part.detach().clone(), states)


class _Arriving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return d_loss, None, *ctx.gradients


def _with_gradients(loss: Tensor, states: States, gradients: Any) -> Tensor:
    """`loss`, whose backward pass also sends `gradients` into `states`, as they are, however it is scaled.

    `gradients`: of the loss of all later tokens, in the structure of `states`, None where there is none.
    """
    pairs = [
        (state[name], gradient)
        for state, found in zip(states, gradients, strict=True)
        for name, gradient in found.items()
        if gradient is not None
    ]
    return _Arriving.apply(loss, [gradient for _, gradient in pairs], *(state for state, _ in pairs))
