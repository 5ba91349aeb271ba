"""A matrix recurrence segment by segment, forward and backward: what linear attention and the delta rule share.

The backward pass keeps the inputs and one state per segment, and recomputes the chunks of one segment at a time. States
flow from chunk to chunk, and their gradients flow back, by the same loops: `carry` `[N*H, K, V]` holds one state per
document and head in layout order and is updated in place; `steps` is `Segment.steps(H)`, reversed for gradients;
`starts` receives the carry as each chunk finds it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.layout import ChunkLayout, Segment, chunk_layout
from seqtrain.kernels.operator import Inputs


class ChunkForm(NamedTuple):
    """What is an operator's own. `carry` `[n*H,K,V]`: the states a segment finds, and leaves, in place.

    outputs: `(inputs, segment, carry, scale)` -> rows of the output.
    gradients: `(inputs, segment, carry, d_out, d_carry)` -> rows of each input's gradient, or None; d_out: rows of the
        output's gradient, scaled; d_carry goes from the segment's end to its start in place.
    """

    outputs: Callable[[Inputs, Segment, Tensor, float], Tensor]
    gradients: Callable[[Inputs, Segment, Tensor, Tensor, Tensor], Sequence[Tensor | None]]

    def run(self, inputs: Inputs, state: Tensor, scale: float, layout: ChunkLayout) -> tuple[Tensor, Tensor]:
        """`(out, final_state)`, differentiable."""
        return _Chunked.apply(self, scale, layout, state, *inputs)

    def forward(
        self, inputs: Inputs, state: Tensor, scale: float, layout: ChunkLayout
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`(out [B,T,H,V], final_state [N,H,K,V], checkpoints)`: a checkpoint is the carry before a segment."""
        tensors = _contiguous(inputs)
        checkpoints: list[Tensor] = []
        assert tensors[2] is not None
        out, heads = torch.empty_like(tensors[2]), state.shape[1]
        final_state = layout.sort_states(state)
        carry = final_state.flatten(0, 1)  # a view, so that the result itself is none: callers may write into it
        for segment in layout.segments(segment_limit(carry, heads, layout.chunk)):
            checkpoints.append(carry[: segment.counts[0] * heads].clone())
            segment.put(out, self.outputs(tensors, segment, carry, scale))
        return out, layout.restore_states(final_state), checkpoints

    def backward(
        self,
        inputs: Inputs,
        checkpoints: Sequence[Tensor],
        d_out: Tensor,
        d_final: Tensor,
        scale: float,
        layout: ChunkLayout,
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of `inputs`, in their dtypes, and of the initial state."""
        tensors = _contiguous(inputs)
        gradients = [None if x is None else torch.empty_like(x) for x in tensors]
        d_out, heads = d_out.contiguous(), d_out.shape[2]
        d_state = layout.sort_states(d_final)
        d_carry = d_state.flatten(0, 1)
        segments = layout.segments(segment_limit(d_carry, heads, layout.chunk))
        for segment, checkpoint in zip(reversed(segments), reversed(checkpoints), strict=True):
            d_out_rows = segment.take(d_out, d_final.dtype).mul_(scale)
            found = self.gradients(tensors, segment, checkpoint.clone(), d_out_rows, d_carry)
            for gradient, rows in zip(gradients, found, strict=True):
                if gradient is not None and rows is not None:
                    segment.put(gradient, rows)
        return gradients, layout.restore_states(d_state)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: ChunkForm, scale: float, layout: ChunkLayout, state: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, final_state, checkpoints = form.forward(inputs, state, scale, layout)
        ctx.save_for_backward(*inputs, *checkpoints)
        ctx.form, ctx.scale, ctx.layout, ctx.count = form, scale, layout, len(inputs)
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing recomputes them on the first read and refuses a second.
        saved = ctx.saved_tensors
        inputs, checkpoints = saved[: ctx.count], saved[ctx.count :]
        with full_precision(d_out.device):
            gradients, d_state = ctx.form.backward(inputs, checkpoints, d_out, d_final, ctx.scale, ctx.layout)
        return None, None, None, d_state, *gradients


def layout_of(keys: Tensor, values: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """How rows with states of `keys: [B,T,H,K]` and `values: [B,T,H,V]` are laid out in chunks."""
    chunk = chunk_length(keys.shape[3], values.shape[3])
    return chunk_layout(keys.shape[0], keys.shape[1], cu_seqlens, chunk=chunk, device=keys.device)


def _contiguous(inputs: Inputs) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in inputs]


def rows_of(inputs: Inputs, segment: Segment, dtype: torch.dtype) -> tuple[list[Any], int]:
    """A segment's rows of each input, `[chunks*H, C, ...]`, and H."""
    rows = [None if x is None else segment.take(x, dtype) for x in inputs]
    assert inputs[0] is not None
    return rows, inputs[0].shape[2]


# `Segment.steps`: the rows of each step and how many carried states it updates.
Steps = Sequence[tuple[slice, int]]

# Numbers a segment's temporaries may take, about: 14 MB of float32. Larger segments fall out of the cache, smaller ones
# pay for more operations: the fastest of eight sizes tried on two shared cores, by a margin within their noise.
SEGMENT_NUMBERS = 3_500_000


def chunk_length(key_width: int, value_width: int) -> int:
    """Tokens per chunk: 64, or 32 for narrow heads, where products inside a chunk outweigh those with states.

    Measured, forward + backward on one core: 32 is 7-22% faster at K=V=32, about even at 64, and up to
    13% slower at 128.
    """
    return 32 if max(key_width, value_width) <= 32 else 64


def segment_limit(carry: Tensor, heads: int, chunk: int) -> int:
    """How many chunks of `chunk` tokens to work on at once, for `ChunkLayout.segments`. carry: `[N*H,K,V]`."""
    key_width, value_width = carry.shape[1:]
    row = 2 * chunk * (key_width + value_width) + 2 * key_width * value_width + 3 * chunk * chunk
    return max(1, SEGMENT_NUMBERS // (heads * row))


def scan_additive(carry: Tensor, steps: Steps, factor: Tensor | None, update: Tensor, starts: Tensor) -> None:
    """`carry <- factor * carry + update` in each step.

    factor: None (1), `[R,1,1]` or `[R,K,1]`. update, starts: `[R,K,V]`.
    """
    for rows, found, left in _walk(carry, steps, starts):
        _decay_and_add(found, None if factor is None else factor[rows], update[rows], left)


def scan_through(
    carry: Tensor,
    steps: Steps,
    factor: Tensor | None,
    read: Tensor,
    inner: Tensor,
    write: Tensor,
    update: Tensor | None,
    starts: Tensor,
) -> None:
    """`inner <- inner + read @ carry`, then `carry <- factor * carry + write @ inner + update`, in each step.

    read: `[R,C,K]`. inner: `[R,C,V]`, updated in place. write: `[R,K,C]`. update: `[R,K,V]`, or None for 0.
    """
    for rows, found, left in _walk(carry, steps, starts):
        written = inner[rows].baddbmm_(read[rows], found)
        _decay_and_add(found, None if factor is None else factor[rows], None if update is None else update[rows], left)
        left.baddbmm_(write[rows], written)


def _decay_and_add(state: Tensor, factor: Tensor | None, update: Tensor | None, out: Tensor) -> None:
    """`out = factor * state + update` in one pass; None stands for a factor of 1 or an update of 0."""
    if update is None:
        out.copy_(state) if factor is None else torch.mul(state, factor, out=out)
    elif factor is None:
        torch.add(state, update, out=out)
    else:
        torch.addcmul(update, state, factor, out=out)


def _walk(carry: Tensor, steps: Steps, starts: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each step: its rows, the states it finds (in `starts`), and where to write the states it leaves.

    That is straight into the next step's `starts` while the same documents take part, and into `carry` where that
    changes and at the end: a copy saved on nearly every step.
    """
    starts[steps[0][0]] = carry[: steps[0][1]]
    for (rows, count), following in zip_longest(steps, steps[1:]):
        if following is not None and following[1] == count:
            yield rows, starts[rows], starts[following[0]]
        else:
            yield rows, starts[rows], carry[:count]
            if following is not None:
                starts[following[0]] = carry[: following[1]]


def factor_gradient(factor: Tensor | None, starts: Tensor, d_ends: Tensor) -> Tensor | None:
    """Gradient of a chunk's `factor`, in its shape: `starts * d_ends` summed over what the factor is shared across."""
    if factor is None:
        return None
    if factor.shape[1] == 1:
        return torch.linalg.vecdot(starts.flatten(1), d_ends.flatten(1))[:, None, None]
    return torch.linalg.vecdot(starts, d_ends)[..., None]
