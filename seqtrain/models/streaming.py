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
from itertools import pairwise, zip_longest
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.mixers import State
from seqtrain.parallel.sequence import SequenceContext

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
    continues: bool

    @classmethod
    def of(
        cls, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor, *, first: int, sequence: SequenceContext
    ) -> "Segment":
        """The segment that begins with token `first` of a row whose documents start at `cu_seqlens`, int `[N+1]`.

        `sequence`: over the boundaries that `boundaries_within` finds for it.
        """
        return cls(tokens, labels, sequence, continues=not bool((cu_seqlens == first).any()))


def stream_backward(
    model: Callable[..., Any],
    segments: Sequence[Segment],
    *,
    gradients: Gradients,
    backward: Callable[[Tensor], None],
    done: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Adds the gradients of the loss of a row to the weights; returns the loss, a float32 scalar summed over tokens.

    `model`: a `LanguageModel`, or what calls one. `backward`: runs the backward pass of one segment's loss, a scalar,
    which it may scale, by the same factor each time; it is called once a segment. `done`: is told after each run of a
    segment how many are done and how many there are, both passes counted.
    """
    if len(segments) == 1:
        return _whole(model, segments[0], backward)
    if gradients == "truncated":
        return _truncated(model, segments, backward, done)
    before = _boundary_states(model, segments, done)
    runs = len(before) - 1 + len(segments)
    losses, arriving = [], None
    for segment in reversed(segments):
        state = before.pop()
        leaves = None if state is None else tree_map(_leaf, state)
        # The model is given dicts of its own: ZeRO-3 puts tensors that are no leaves into those that modules are given.
        given = None if leaves is None else [dict(layer) for layer in leaves]
        loss, after = model(segment.tokens, segment.labels, given, sequence=segment.sequence, keep_state=True)
        losses.append(loss.detach())
        backward(loss if arriving is None else _with_gradients(loss, after, arriving))
        arriving = None if leaves is None else tree_map(_gradient, leaves)
        done(runs - len(before), runs)
    return torch.stack(losses).sum()


class Run(Protocol):
    """Runs the model on a segment. `state`: before it, None where nothing is carried into it.

    Gives what is wanted of it, and with `keep_state` the state after it, else None.
    """

    def __call__(self, segment: Segment, state: States | None, *, keep_state: bool) -> tuple[Any, States | None]: ...


def stream_forward(run: Run, segments: Sequence[Segment]) -> Iterator[Any]:
    """What `run` gives for each segment in turn, the state being carried on; without gradients."""
    state: States | None = None
    for segment, following in zip_longest(segments, segments[1:]):
        with torch.no_grad():
            found, state = run(segment, state, keep_state=following is not None and following.continues)
            state = None if state is None else tree_map(_kept, state)
        yield found


def _whole(model: Callable[..., Any], segment: Segment, backward: Callable[[Tensor], None]) -> Tensor:
    """A row of one segment: its state is nobody's, so it is not kept."""
    loss = model(segment.tokens, segment.labels, sequence=segment.sequence)
    backward(loss)
    return loss.detach()


def _truncated(
    model: Callable[..., Any],
    segments: Sequence[Segment],
    backward: Callable[[Tensor], None],
    done: Callable[[int, int], None],
) -> Tensor:
    losses, state = [], None
    for segment in segments:
        past: States | None = state if segment.continues else None
        loss, after = model(segment.tokens, segment.labels, past, sequence=segment.sequence, keep_state=True)
        losses.append(loss.detach())
        backward(loss)
        state = tree_map(_kept, after)
        done(len(losses), len(segments))
    return torch.stack(losses).sum()


def _boundary_states(
    model: Callable[..., Any], segments: Sequence[Segment], done: Callable[[int, int], None]
) -> list[States | None]:
    """The state before each segment; None where nothing is carried into it."""
    before: list[States | None] = [None]
    for segment, following in pairwise(segments):
        # Also where nothing goes on from the state: with ZeRO-3, where each run gathers weights, ranks with other
        # documents would wait for this one.
        with torch.no_grad():
            _, state = model(segment.tokens, state=before[-1], sequence=segment.sequence)
        before.append(tree_map(_kept, state) if following.continues else None)
        done(len(before) - 1, 2 * len(segments) - 1)
    return before


def _kept(part: Tensor) -> Tensor:
    """A state alone, not the larger tensor it may be a view of."""
    return part.detach().clone()


def _leaf(part: Tensor) -> Tensor:
    return part.requires_grad_(part.is_floating_point() or part.is_complex())


def _gradient(leaf: Tensor) -> Tensor | None:
    return leaf.grad


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


def boundaries_within(starts: Tensor, first: int, last: int) -> Tensor:
    """int32 `[N+1]`: `cu_seqlens` of the tokens `first` to `last` of a row whose documents start at `starts`."""
    inner = starts[(starts > first) & (starts < last)] - first
    return torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([last - first])]).to(torch.int32)
