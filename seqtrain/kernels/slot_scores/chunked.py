"""Slot scores in chunks, by linear attention's own forward and backward passes.

With `L(g) = sum_t q_t . out_t` for the outputs of linear attention with queries g, keys w and values k, the scores are
`dL/dg`: its backward pass computes them. And given their gradients g, L(g) is the loss: its forward pass with these
queries gives the gradient of q, its backward pass all others.
"""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.chunk_form import layout_of
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.linear_attention.chunked import FORM
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.slot_scores import slot_scores


@slot_scores.backend(like=lambda inputs, state: inputs[2].to(inputs[0].dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Chunked `slot_scores`."""
    return _SlotScores.apply(*inputs, state, scale, layout_of(inputs[2], inputs[1], cu_seqlens))


class _SlotScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, written, log_decay, state, scale, layout = arguments
        # Which queries is all the same here: the scores are linear attention's gradient of any.
        any_query = torch.zeros_like(written, dtype=q.dtype)
        inputs = (any_query, written, k, log_decay)
        _, final_state, checkpoints = FORM.forward(inputs, state, scale, layout)
        (out, *_), _ = FORM.backward(inputs, checkpoints, q, torch.zeros_like(final_state), scale, layout)
        assert out is not None
        ctx.save_for_backward(q, k, written, log_decay, state)
        ctx.scale, ctx.layout = scale, layout
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, written, log_decay, state = ctx.saved_tensors
        with full_precision(q.device):
            inputs = (d_out, written, k, log_decay)
            d_q, _, checkpoints = FORM.forward(inputs, state, ctx.scale, ctx.layout)
            gradients, d_state = FORM.backward(inputs, checkpoints, q, d_final, ctx.scale, ctx.layout)
        _, d_written, d_k, d_log = gradients
        return d_q.to(q.dtype), d_k, d_written, d_log, d_state, None, None
