"""Linear attention with decay in chunks: matrix products inside a chunk, a short loop over chunk states."""

import torch
from torch import Tensor

from seqtrain.kernels.chunk_form import ChunkForm, factor_gradient, layout_of, rows_of, scan_additive
from seqtrain.kernels.decay import Products, decayed_products, decayed_products_backward
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.layout import Segment
from seqtrain.kernels.linear_attention import linear_attention
from seqtrain.kernels.operator import Inputs


@linear_attention.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Chunked `linear_attention`."""
    return FORM.run(inputs, state, scale, layout_of(inputs[0], inputs[2], cu_seqlens))


def find_map(inputs: Inputs, no_state: None) -> tuple[Tensor | None, Tensor]:
    """What a segment makes of the state, without its outputs: `(transition, update)`, see `LinearAttentionSegment`.

    inputs: those of the operator, q aside, log_decay not `[H]`. update `[B,H,K,V]`, transition None, `[B,H]` or
    `[B,H,K]`, in the state's dtype.
    """
    _, k, v, log_decay = inputs
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


def read(inputs: Inputs, state: Tensor, scale: float) -> Tensor:
    """`out` `[B,T,H,V]` and what the queries read in the state before the segment, `scale (q_i e^{b_i}) S`.

    inputs: as for `find_map`, with q and without k, and `out` in the place of v; state `[B,H,K,V]`.
    """
    q, _, out, log_decay = inputs
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


def _outputs(inputs: Inputs, segment: Segment, carry: Tensor, scale: float) -> Tensor:
    (q, k, v, log_decay), heads = rows_of(inputs, segment, carry.dtype)
    products = decayed_products([q], k, log_decay)
    starts = carry.new_empty(q.shape[0], *carry.shape[1:])
    scan_additive(carry, segment.steps(heads), products.factor, products.keys.mT @ v, starts)
    return (products.pairs[0] @ v).baddbmm_(products.rows[0], starts, beta=scale, alpha=scale)


def _gradients(
    inputs: Inputs, segment: Segment, carry: Tensor, d_out: Tensor, d_carry: Tensor
) -> tuple[Tensor | None, ...]:
    (q, k, v, log_decay), heads = rows_of(inputs, segment, carry.dtype)
    products = decayed_products([q], k, log_decay)
    starts = carry.new_empty(q.shape[0], *carry.shape[1:])
    d_ends = torch.empty_like(starts)
    steps = segment.steps(heads)
    scan_additive(carry, steps, products.factor, products.keys.mT @ v, starts)
    scan_additive(d_carry, steps[::-1], products.factor, products.rows[0].mT @ d_out, d_ends)
    d_v = (products.pairs[0].mT @ d_out).baddbmm_(products.keys, d_ends)
    d_products = Products(
        pairs=[d_out @ v.mT],
        rows=[d_out @ starts.mT],
        keys=v @ d_ends.mT,
        factor=factor_gradient(products.factor, starts, d_ends),
    )
    (d_q,), d_k, d_log = decayed_products_backward([q], k, log_decay, products, d_products)
    return d_q, d_k, d_v, d_log


FORM = ChunkForm(_outputs, _gradients)
