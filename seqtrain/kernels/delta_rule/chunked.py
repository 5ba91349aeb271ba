"""The delta rule in chunks: the triangular solve inside a chunk, a loop of two small products over chunk states.

Symbols as in MATH.md 1.2, with `beta` on the columns so that nothing is divided by it. With E the errors before `beta`,
`n = beta * E` the values really written, N the strictly lower decayed products of keys,

    inverse = (I + N diag(beta))^{-1}      E = inverse (v - (k e^b) S)      out = scale (pairs n + (q e^b) S)

The backward pass keeps the inputs and one state a segment, and recomputes the chunks of one segment at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.decay import Products, decayed_products, decayed_products_backward
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.layout import ChunkLayout, Segment, chunk_layout
from seqtrain.kernels.states import chunk_length, factor_gradient, scan_through, segment_limit
from seqtrain.kernels.triangular import unit_lower_inverse

# q, k `[B,T,H,K]`, v `[B,T,H,V]`, beta `[B,T,H]`, log_decay None, `[B,T,H]` or `[B,T,H,K]`.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chunked `delta_rule`; arguments as `delta_rule` normalises them."""
    chunk = chunk_length(q.shape[3], v.shape[3])
    layout = chunk_layout(q.shape[0], q.shape[1], cu_seqlens, chunk=chunk, device=q.device)
    return _DeltaRule.apply(q, k, v, beta, log_decay, state, scale, layout)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        scale: float,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor]:
        out, final_state, checkpoints = forward((q, k, v, beta, log_decay), state, scale, layout)
        ctx.save_for_backward(q, k, v, beta, log_decay, *checkpoints)
        ctx.scale, ctx.layout = scale, layout
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing recomputes them on the first read and refuses a second.
        saved = ctx.saved_tensors
        inputs, checkpoints = saved[:5], saved[5:]
        with full_precision(d_out.device):
            gradients, d_state = backward(inputs, checkpoints, d_out, d_final, ctx.scale, ctx.layout)
        return *gradients, d_state, None, None


@dataclass
class _Chunks:
    """What a segment's chunks need besides the incoming state; R rows are chunks x heads."""

    q: Tensor  # [R,C,K]
    k: Tensor  # [R,C,K]
    v: Tensor  # [R,C,V]
    beta: Tensor  # [R,C,1]
    log_decay: Tensor | None  # [R,C] or [R,C,K]
    products: Products  # of the row sets q and k
    inverse: Tensor  # [R,C,C]
    read: Tensor  # [R,C,K]: -inverse (k e^b), so that E = errors + read S
    write: Tensor  # [R,C,K]: beta * k e^{b_C - b}, so that S' = factor S + write^T E
    errors: Tensor  # [R,C,V]: inverse v, E's part without incoming state


def _contiguous(inputs: Inputs) -> Inputs:
    q, k, v, beta, log_decay = inputs
    log_decay = None if log_decay is None else log_decay.contiguous()
    return q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), log_decay


def _prepare(inputs: Inputs, segment: Segment, dtype: torch.dtype) -> _Chunks:
    q, k, v, beta = (segment.take(x, dtype) for x in inputs[:4])
    log_decay = None if inputs[4] is None else segment.take(inputs[4], dtype)
    beta = beta[..., None]
    products = decayed_products([q, k], k, log_decay)
    inverse = unit_lower_inverse(products.pairs[1] * beta.mT)
    read = (inverse @ products.rows[1]).neg_()
    return _Chunks(q, k, v, beta, log_decay, products, inverse, read, products.keys * beta, inverse @ v)


def forward(inputs: Inputs, state: Tensor, scale: float, layout: ChunkLayout) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`(out [B,T,H,V], final_state [N,H,K,V], checkpoints)`.

    A checkpoint is the carry `[n*H,K,V]` before a segment.
    """
    inputs = _contiguous(inputs)
    heads = inputs[2].shape[2]
    out = torch.empty_like(inputs[2])
    final_state = layout.sort_states(state)
    carry = final_state.flatten(0, 1)  # a view, so that the result itself is none: callers may write into it
    checkpoints = []
    for segment in layout.segments(segment_limit(carry, heads, layout.chunk)):
        checkpoints.append(carry[: segment.counts[0] * heads].clone())
        c = _prepare(inputs, segment, state.dtype)
        starts = carry.new_empty(c.q.shape[0], *carry.shape[1:])
        scan_through(carry, segment.steps(heads), c.products.factor, c.read, c.errors, c.write.mT, None, starts)
        out_rows = c.products.pairs[0] @ (c.errors * c.beta)
        segment.put(out, out_rows.baddbmm_(c.products.rows[0], starts, beta=scale, alpha=scale))
    return out, layout.restore_states(final_state), checkpoints


def backward(
    inputs: Inputs,
    checkpoints: Sequence[Tensor],
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    layout: ChunkLayout,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of `inputs` (q, k, v, beta, log_decay), in their dtypes, and of the initial state."""
    inputs = _contiguous(inputs)
    gradients = [None if x is None else torch.empty_like(x) for x in inputs]
    d_out, heads = d_out.contiguous(), d_out.shape[2]
    d_state = layout.sort_states(d_final)
    d_carry = d_state.flatten(0, 1)
    segments = layout.segments(segment_limit(d_carry, heads, layout.chunk))
    for segment, checkpoint in zip(reversed(segments), reversed(checkpoints), strict=True):
        c = _prepare(inputs, segment, d_final.dtype)
        starts = checkpoint.new_empty(c.q.shape[0], *checkpoint.shape[1:])
        steps = segment.steps(heads)
        scan_through(checkpoint.clone(), steps, c.products.factor, c.read, c.errors, c.write.mT, None, starts)
        d_out_rows = segment.take(d_out, d_final.dtype).mul_(scale)
        found = _segment_gradients(c, starts, d_out_rows, d_carry, steps)
        for gradient, rows in zip(gradients, found, strict=True):
            if gradient is not None and rows is not None:
                segment.put(gradient, rows)
    return gradients, layout.restore_states(d_state)


def _segment_gradients(
    c: _Chunks, starts: Tensor, d_out: Tensor, d_carry: Tensor, steps: list[tuple[slice, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a segment's q, k, v, beta, log_decay rows; `d_carry` goes from its end to its start in place."""
    products, (pairs, key_pairs) = c.products, c.products.pairs
    d_written = pairs.mT @ d_out  # gradient of n, without what reaches it through the outgoing state
    d_errors = d_written * c.beta
    d_ends = torch.empty_like(starts)
    scan_through(
        d_carry, steps[::-1], products.factor, c.write, d_errors, c.read.mT, products.rows[0].mT @ d_out, d_ends
    )
    d_v = c.inverse.mT @ d_errors
    d_written.baddbmm_(products.keys, d_ends).baddbmm_(key_pairs.mT, d_v, alpha=-1)
    d_beta = torch.linalg.vecdot(d_written, c.errors)
    written = c.errors * c.beta
    minus_d_v = -d_v
    d_products = Products(
        pairs=[d_out @ written.mT, minus_d_v @ written.mT],
        rows=[d_out @ starts.mT, minus_d_v @ starts.mT],
        keys=written @ d_ends.mT,
        factor=factor_gradient(products.factor, starts, d_ends),
    )
    (d_q, d_k_reading), d_k, d_log = decayed_products_backward([c.q, c.k], c.k, c.log_decay, products, d_products)
    return d_q, d_k.add_(d_k_reading), d_v, d_beta, d_log
