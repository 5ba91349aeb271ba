"""A matrix recurrence segment by segment, forward and backward: what linear attention and the delta rule share.

The backward pass keeps the inputs and one state per segment, and recomputes the chunks of one segment at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.layout import ChunkLayout, Segment, chunk_layout
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.states import chunk_length, segment_limit


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
