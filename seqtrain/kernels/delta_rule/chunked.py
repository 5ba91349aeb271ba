"""The delta rule in chunks: the triangular solve inside a chunk, a loop of two small products over chunk states.

Symbols as in docs/math.md, section 1.2, with `beta` on the columns so that nothing is divided by it. With E the errors
before `beta`, `n = beta * E` the values really written, N the strictly lower decayed products of keys,

    inverse = (I + N diag(beta))^{-1}      E = inverse (v - (k e^b) S)      out = scale (pairs n + (q e^b) S)

Where `read` and `erase` stand for k, a token writes twice: w = beta * v along k, and n = beta * E along erase, E being
minus what the state answers to `read`. With N and pairs now products with erase, M and pairs_k those with k,

    E = -inverse (M w + (read e^b) S)      out = scale (pairs n + pairs_k w + (q e^b) S)

The backward pass keeps the inputs and one state per segment, and recomputes the chunks of one segment at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.decay import Products, decayed_products, decayed_products_backward
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.layout import ChunkLayout, Segment, chunk_layout
from seqtrain.kernels.states import chunk_length, factor_gradient, scan_through, segment_limit
from seqtrain.kernels.triangular import unit_lower_inverse

# q, k `[B,T,H,K]`, v `[B,T,H,V]`, beta `[B,T,H]`, log_decay None, `[B,T,H]` or `[B,T,H,K]`, read and erase `[B,T,H,K]`
# or None.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@opaque("delta_rule_chunked", like=lambda *x: (x[2], x[5]))
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    read: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked `delta_rule`; arguments as `delta_rule` normalises them."""
    chunk = chunk_length(q.shape[3], v.shape[3])
    layout = chunk_layout(q.shape[0], q.shape[1], cu_seqlens, chunk=chunk, device=q.device)
    return _DeltaRule.apply(q, k, v, beta, log_decay, read, erase, state, scale, layout)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        read: Tensor | None,
        erase: Tensor | None,
        state: Tensor,
        scale: float,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q, k, v, beta, log_decay, read, erase)
        out, final_state, checkpoints = forward(inputs, state, scale, layout)
        ctx.save_for_backward(*inputs, *checkpoints)
        ctx.scale, ctx.layout = scale, layout
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing recomputes them on the first read and refuses a second.
        saved = ctx.saved_tensors
        inputs, checkpoints = saved[:7], saved[7:]
        with full_precision(d_out.device):
            gradients, d_state = backward(inputs, checkpoints, d_out, d_final, ctx.scale, ctx.layout)
        return *gradients, d_state, None, None


@dataclass
class _Added:
    """What tokens write along k, where that is not where they erase."""

    k: Tensor  # [R,C,K]
    v: Tensor  # [R,C,V]
    products: Products  # of the row sets q and read with k
    written: Tensor  # [R,C,V]: beta * v


@dataclass
class _Chunks:
    """What a segment's chunks need besides the incoming state; R rows are chunks x heads."""

    q: Tensor  # [R,C,K]
    read: Tensor  # [R,C,K]: k, unless given
    erase: Tensor  # [R,C,K]: k, unless given
    beta: Tensor  # [R,C,1]
    log_decay: Tensor | None  # [R,C] or [R,C,K]
    products: Products  # of the row sets q and read with erase
    inverse: Tensor  # [R,C,C]
    reading: Tensor  # [R,C,K]: -inverse (read e^b), so that E = errors + reading S
    write: Tensor  # [R,C,K]: beta * erase e^{b_C - b}, so that S' = factor S + write^T E (+ update)
    errors: Tensor  # [R,C,V]: E's part without incoming state, inverse v or -inverse M w; the scan adds the rest
    added: _Added | None

    def update(self) -> Tensor | None:
        """What k and v add to the outgoing state besides E, `[R,K,V]`."""
        return None if self.added is None else self.added.products.keys.mT @ self.added.written


def _contiguous(inputs: Inputs) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in inputs]


def _prepare(inputs: Sequence[Tensor | None], segment: Segment, dtype: torch.dtype) -> _Chunks:
    q, k, v, beta, log_decay, read, erase = (None if x is None else segment.take(x, dtype) for x in inputs)
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    asked, taken = (k, k) if read is None or erase is None else (read, erase)
    beta = beta[..., None]
    products = decayed_products([q, asked], taken, log_decay)
    inverse = unit_lower_inverse(products.pairs[1] * beta.mT)
    reading = (inverse @ products.rows[1]).neg_()
    if taken is k:
        added, errors = None, inverse @ v
    else:
        with_k = decayed_products([q, asked], k, log_decay)
        added = _Added(k, v, with_k, v * beta)
        errors = (inverse @ (with_k.pairs[1] @ added.written)).neg_()
    return _Chunks(q, asked, taken, beta, log_decay, products, inverse, reading, products.keys * beta, errors, added)


def forward(inputs: Inputs, state: Tensor, scale: float, layout: ChunkLayout) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`(out [B,T,H,V], final_state [N,H,K,V], checkpoints)`.

    A checkpoint is the carry `[n*H,K,V]` before a segment.
    """
    tensors, v = _contiguous(inputs), inputs[2]
    heads = v.shape[2]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = layout.sort_states(state)
    carry = final_state.flatten(0, 1)  # a view, so that the result itself is none: callers may write into it
    checkpoints = []
    for segment in layout.segments(segment_limit(carry, heads, layout.chunk)):
        checkpoints.append(carry[: segment.counts[0] * heads].clone())
        c = _prepare(tensors, segment, state.dtype)
        starts = carry.new_empty(c.q.shape[0], *carry.shape[1:])
        steps = segment.steps(heads)
        scan_through(carry, steps, c.products.factor, c.reading, c.errors, c.write.mT, c.update(), starts)
        out_rows = c.products.pairs[0] @ (c.errors * c.beta)
        if c.added is not None:
            out_rows.baddbmm_(c.added.products.pairs[0], c.added.written)
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
    """Gradients of `inputs`, in their dtypes, and of the initial state."""
    tensors = _contiguous(inputs)
    gradients = [None if x is None else torch.empty_like(x) for x in tensors]
    d_out, heads = d_out.contiguous(), d_out.shape[2]
    d_state = layout.sort_states(d_final)
    d_carry = d_state.flatten(0, 1)
    segments = layout.segments(segment_limit(d_carry, heads, layout.chunk))
    for segment, checkpoint in zip(reversed(segments), reversed(checkpoints), strict=True):
        c = _prepare(tensors, segment, d_final.dtype)
        starts = checkpoint.new_empty(c.q.shape[0], *checkpoint.shape[1:])
        steps = segment.steps(heads)
        scan_through(checkpoint.clone(), steps, c.products.factor, c.reading, c.errors, c.write.mT, c.update(), starts)
        d_out_rows = segment.take(d_out, d_final.dtype).mul_(scale)
        found = _segment_gradients(c, starts, d_out_rows, d_carry, steps)
        for gradient, rows in zip(gradients, found, strict=True):
            if gradient is not None and rows is not None:
                segment.put(gradient, rows)
    return gradients, layout.restore_states(d_state)


def _segment_gradients(
    c: _Chunks, starts: Tensor, d_out: Tensor, d_carry: Tensor, steps: list[tuple[slice, int]]
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows of a segment's inputs; `d_carry` goes from its end to its start in place."""
    products, (pairs, asked_pairs) = c.products, c.products.pairs
    d_written = pairs.mT @ d_out  # gradient of n, without what reaches it through the outgoing state
    d_errors = d_written * c.beta
    d_ends = torch.empty_like(starts)
    scan_through(
        d_carry, steps[::-1], products.factor, c.write, d_errors, c.reading.mT, products.rows[0].mT @ d_out, d_ends
    )
    d_solved = c.inverse.mT @ d_errors  # gradient of what the inverse is applied to
    d_written.baddbmm_(products.keys, d_ends).baddbmm_(asked_pairs.mT, d_solved, alpha=-1)
    d_beta = torch.linalg.vecdot(d_written, c.errors)
    written = c.errors * c.beta
    d_asked = -d_solved
    d_products = Products(
        pairs=[d_out @ written.mT, d_asked @ written.mT],
        rows=[d_out @ starts.mT, d_asked @ starts.mT],
        keys=written @ d_ends.mT,
        factor=factor_gradient(products.factor, starts, d_ends),
    )
    (d_q, d_read), d_erase, d_log = decayed_products_backward([c.q, c.read], c.erase, c.log_decay, products, d_products)
    if c.added is None:
        return d_q, d_erase.add_(d_read), d_solved, d_beta, d_log, None, None
    d_added, d_k, d_v, d_beta_added, d_log_added = _added_gradients(c, c.added, d_out, d_asked, d_ends)
    if d_log is not None and d_log_added is not None:
        d_log = d_log + d_log_added
    return d_q + d_added[0], d_k, d_v, d_beta + d_beta_added, d_log, d_read + d_added[1], d_erase


def _added_gradients(
    c: _Chunks, added: _Added, d_out: Tensor, d_asked: Tensor, d_ends: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
    """What the writes along k give the gradients of q and read, and those of k, v, beta, log_decay.

    `d_asked`: the gradient of E before the inverse, `[R,C,V]`; `d_ends`: that of the outgoing states.
    """
    products, (pairs, asked_pairs) = added.products, added.products.pairs
    d_written = (pairs.mT @ d_out).baddbmm_(products.keys, d_ends).baddbmm_(asked_pairs.mT, d_asked)
    # The rows' and the factor's own gradients are counted with the products of erase.
    d_products = Products(
        pairs=[d_out @ added.written.mT, d_asked @ added.written.mT],
        rows=[torch.zeros_like(x) for x in products.rows],
        keys=added.written @ d_ends.mT,
        factor=None if products.factor is None else torch.zeros_like(products.factor),
    )
    d_rows, d_k, d_log = decayed_products_backward([c.q, c.read], added.k, c.log_decay, products, d_products)
    return d_rows, d_k, d_written * c.beta, torch.linalg.vecdot(d_written, added.v), d_log
