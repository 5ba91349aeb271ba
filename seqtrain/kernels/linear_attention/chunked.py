"""Linear attention with decay in chunks: matrix products inside a chunk, a short loop over chunk states.

The backward pass keeps the inputs and one state a segment, and recomputes the chunks of one segment at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.decay import Products, decayed_products, decayed_products_backward
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.layout import ChunkLayout, chunk_layout
from seqtrain.kernels.states import chunk_length, factor_gradient, scan_additive, segment_limit


@opaque("linear_attention_chunked", like=lambda *x: (x[2], x[4]))
def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunked `linear_attention`; arguments as `linear_attention` normalises them."""
    chunk = chunk_length(q.shape[3], v.shape[3])
    layout = chunk_layout(q.shape[0], q.shape[1], cu_seqlens, chunk=chunk, device=q.device)
    return _LinearAttention.apply(q, k, v, log_decay, state, scale, layout)


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What a segment makes of the state, without its outputs: `(transition, update)`, see `segment`.

    k `[B,T,H,K]`, v `[B,T,H,V]`, log_decay None, `[B,T,H]` or `[B,T,H,K]`; update `[B,H,K,V]`, transition None, `[B,H]`
    or `[B,H,K]`, in the state's dtype.
    """
    dtype = state_dtype(k.dtype)
    k, v = k.to(dtype), v.to(dtype)
    if log_decay is None:
        return None, _outer(k, v)
    log_decay = log_decay.to(dtype)
    # Summed from the end: where a weight is not negligible, its exponent is then a sum of few terms.
    left = log_decay.flip(1).cumsum(1).flip(1)
    to_end = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], 1).exp()
    # Contiguous, since the order of a sum depends on strides, and bits are to depend on numbers alone.
    return log_decay.contiguous().sum(1).exp(), _outer(_weighted(k, to_end), v)


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """`out` `[B,T,H,V]` and what the queries read in the state before the segment, `scale (q_i e^{b_i}) S`.

    q, log_decay: as for `find_map`; state `[B,H,K,V]`.
    """
    q = q.to(state.dtype)
    if log_decay is not None:
        q = _weighted(q, log_decay.to(state.dtype).cumsum(1).exp())
    return out + torch.einsum("bthk,bhkv->bthv", q, state * scale).to(out.dtype)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """`rows [B,T,H,K] * weights`, `[B,T,H]` or `[B,T,H,K]`."""
    return rows * (weights if weights.dim() == 4 else weights[..., None])


def _outer(k: Tensor, v: Tensor) -> Tensor:
    """`sum_t k_t^T v_t`: `[B,T,H,K]`, `[B,T,H,V]` -> `[B,H,K,V]`."""
    return torch.einsum("bthk,bthv->bhkv", k, v)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        scale: float,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor]:
        out, final_state, checkpoints = forward(q, k, v, log_decay, state, scale, layout)
        ctx.save_for_backward(q, k, v, log_decay, *checkpoints)
        ctx.scale, ctx.layout = scale, layout
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *checkpoints = ctx.saved_tensors
        with full_precision(q.device):
            gradients = backward(q, k, v, log_decay, checkpoints, d_out, d_final, ctx.scale, ctx.layout)
        return *gradients, None, None


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, layout: ChunkLayout
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`(out [B,T,H,V], final_state [N,H,K,V], checkpoints)`: a checkpoint is the carry `[n*H,K,V]` before a segment."""
    heads, dtype = q.shape[2], state.dtype
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_decay = None if log_decay is None else log_decay.contiguous()
    out = torch.empty_like(v)
    final_state = layout.sort_states(state)
    carry = final_state.flatten(0, 1)  # a view, so that the result itself is none: callers may write into it
    checkpoints = []
    for segment in layout.segments(segment_limit(carry, heads, layout.chunk)):
        checkpoints.append(carry[: segment.counts[0] * heads].clone())
        q_rows, k_rows, v_rows = (segment.take(x, dtype) for x in (q, k, v))
        log_rows = None if log_decay is None else segment.take(log_decay, dtype)
        products = decayed_products([q_rows], k_rows, log_rows)
        starts = carry.new_empty(q_rows.shape[0], *carry.shape[1:])
        scan_additive(carry, segment.steps(heads), products.factor, products.keys.mT @ v_rows, starts)
        out_rows = products.pairs[0] @ v_rows
        out_rows.baddbmm_(products.rows[0], starts, beta=scale, alpha=scale)
        segment.put(out, out_rows)
    return out, layout.restore_states(final_state), checkpoints


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    checkpoints: Sequence[Tensor],
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    layout: ChunkLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of `q, k, v, log_decay, state`, in their dtypes."""
    heads, dtype = q.shape[2], d_final.dtype
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    log_decay = None if log_decay is None else log_decay.contiguous()
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    d_log = None if log_decay is None else torch.empty_like(log_decay)
    d_state = layout.sort_states(d_final)
    d_carry = d_state.flatten(0, 1)
    segments = layout.segments(segment_limit(d_carry, heads, layout.chunk))
    for segment, checkpoint in zip(reversed(segments), reversed(checkpoints), strict=True):
        q_rows, k_rows, v_rows, d_rows = (segment.take(x, dtype) for x in (q, k, v, d_out))
        d_rows *= scale
        log_rows = None if log_decay is None else segment.take(log_decay, dtype)
        products = decayed_products([q_rows], k_rows, log_rows)
        starts = checkpoint.new_empty(q_rows.shape[0], *checkpoint.shape[1:])
        d_ends = torch.empty_like(starts)
        steps = segment.steps(heads)
        scan_additive(checkpoint.clone(), steps, products.factor, products.keys.mT @ v_rows, starts)
        scan_additive(d_carry, steps[::-1], products.factor, products.rows[0].mT @ d_rows, d_ends)

        d_v_rows = (products.pairs[0].mT @ d_rows).baddbmm_(products.keys, d_ends)
        d_products = Products(
            pairs=[d_rows @ v_rows.mT],
            rows=[d_rows @ starts.mT],
            keys=v_rows @ d_ends.mT,
            factor=factor_gradient(products.factor, starts, d_ends),
        )
        (d_q_rows,), d_k_rows, d_log_rows = decayed_products_backward([q_rows], k_rows, log_rows, products, d_products)
        segment.put(d_q, d_q_rows)
        segment.put(d_k, d_k_rows)
        segment.put(d_v, d_v_rows)
        if d_log is not None and d_log_rows is not None:
            segment.put(d_log, d_log_rows)
    return d_q, d_k, d_v, d_log, layout.restore_states(d_state)
