"""A packed row run through a model segment by segment: only one segment's activations exist at a time.

Ranks that share the row share each segment, and the last of them hands its states to the first for the next. The
state of every layer is carried from each segment to the next, so the loss is that of the row in one piece. For the
gradient there is a choice:

* exact: first the states at all boundaries between segments are found, without activations; then the segments are run
  from last to first, each from its kept state, and each passes the gradient of that state on to the one before. This
  is activation checkpointing in time: one more forward pass, and the boundaries' states are held.
* truncated: segments are run from first to last and no gradient crosses a boundary (truncated backpropagation through
  time, Williams and Peng 1990). One pass, and one state is held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.data.batches import Batch
from seqtrain.mixers import State
from seqtrain.parallel.handover import gradients_to_last, states_to_first
from seqtrain.parallel.scan import Algorithm
from seqtrain.parallel.sequence import ContinuedSequence, SequenceContext, with_gradients
from seqtrain.parallel.sharded import ShardedSequence

Gradients = Literal["exact", "truncated"]
# States of all layers of a model, as `LanguageModel` takes and returns them.
States = list[State]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a packed row, or this rank's of them.

    `tokens`, `labels`: int64 `[1,T]`; -100 does not count. `sequence`: their documents, with states of one document.
    `group`: the ranks that share the segment; None where one has all of it.
    """

    tokens: Tensor
    labels: Tensor
    sequence: SequenceContext
    group: dist.ProcessGroup | None = None


def cut(batch: Batch, *, group: dist.ProcessGroup | None, backend: str, algorithm: Algorithm = "auto") -> list[Segment]:
    """What this rank of `group` read of a row, as segments whose lengths differ by one token at most."""
    part, parts = (0, 1) if group is None else (group.rank(), group.size())
    found, starts, done = [], batch.cu_seqlens, 0
    # Which boundaries of documents lie in each segment, but for those at its first token.
    edges = starts.new_tensor(batch.offsets[::parts])
    after, until = (torch.searchsorted(starts, edges, right=right).tolist() for right in (True, False))
    for number, begin in enumerate(range(0, len(batch.offsets) - 1, parts)):
        places = batch.offsets[begin : begin + parts + 1]
        first, last = places[0], places[-1]
        inner = starts[after[number] : until[number + 1]] - first
        boundaries = torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([last - first])]).to(torch.int32)
        continues = after[number] == until[number]
        sequence: SequenceContext = ContinuedSequence.of(SequenceContext(boundaries, backend), continues=continues)
        if group is not None:
            sequence = ShardedSequence(
                cu_seqlens=boundaries,
                backend=backend,
                group=group,
                offsets=tuple(place - first for place in places),
                algorithm=algorithm,
                continues=continues,
                continued=True,
            )
        own = slice(done, done := done + places[part + 1] - places[part])
        found.append(Segment(batch.tokens[:, own], batch.labels[:, own], sequence, group))
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
        loss, after = model(segment.tokens, segment.labels, state, sequence=segment.sequence, keep_state=True)
        yield loss
        state = carried(after, segment.group)


def _states(model: Callable[..., Any], segments: Sequence[Segment]) -> Iterator[States]:
    """The state after each segment, found without activations."""
    state: States | None = None
    for segment in segments:
        with torch.no_grad():
            _, after = model(segment.tokens, state=state, sequence=segment.sequence)
        state = carried(after, segment.group)
        yield state


def _exact(model: Callable[..., Any], segments: Sequence[Segment], whole: bool) -> Iterator[Tensor | None]:
    # The state before each segment, also where it is another document's and its gradient zero: in ZeRO-3 ranks with
    # other documents gather each layer's weights as often as this one, and would wait for it.
    before: list[States | None] = [None]
    for done, state in enumerate(_states(model, segments if whole else segments[:-1]), 1):
        if done < len(segments):
            before.append(state)
        yield None
    later = None
    for segment in reversed(segments):
        leaves = before.pop()
        for leaf in with_gradients(leaves or []):
            leaf.requires_grad_()
        # The model is given dicts of its own: ZeRO-3 puts tensors that are no leaves into those that modules are given.
        given = None if leaves is None else [dict(layer) for layer in leaves]
        loss, after = model(segment.tokens, segment.labels, given, sequence=segment.sequence, keep_state=True)
        yield loss if later is None else _with_gradients(loss, after, later, segment.group)
        later = leaves


def carried(states: States, group: dist.ProcessGroup | None) -> States:
    """The states without their graph, as the next segment takes them."""
    if group is not None:
        return states_to_first(states, group)
    # Without the larger tensors they may be views of.
    return tree_map(lambda part: part.detach().clone(), states)


class _Arriving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return d_loss, None, *ctx.gradients


def _with_gradients(loss: Tensor, states: States, leaves: States, group: dist.ProcessGroup | None) -> Tensor:
    """`loss`, whose backward pass also sends gradients into `states`, as they are, however it is scaled.

    They are those of `leaves`, which were made of `states`: of the loss of all later tokens.
    """
    if group is not None:
        gradients = gradients_to_last(leaves, states, group)
    else:
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in with_gradients(leaves)]
    return _Arriving.apply(loss, gradients, *with_gradients(states))
