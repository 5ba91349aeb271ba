"""Linear in T: chunks of tokens run side by side in steps of a few tokens; the backward recomputes them.

`o_t` needs the product of two running sums, entry by entry of `[F, W]`, and no matrix product gives that for many
tokens at once. So the sums advance by steps of c tokens, and a step has four terms (docs/math.md, section 1.4), S the
sums before it, i and j <= t among the new tokens:

    o_t = phi(q_t) (S1 * S2) + sum_i v1_i * (x1_ti S2) + sum_j v2_j * (x2_tj S1)
          + sum_ij (x1_ti . phi(k2_j)) v1_i * v2_j

with `x1_ti = phi(q_t) * phi(k1_i)` and `x2_tj = phi(q_t) * phi(k2_j)`. All are matrix products but for entries of pairs
`(t,i)`, so c is small. W is V+1: values with a column of ones, whose sums divide.

Forward, per segment of the layout: totals of its chunks, what enters each, outputs. Backward, from the last segment to
the first: the first two again; then the steps from last to first, the sums going back by subtraction, at most one chunk
from an exact sum. That gives what the sums before each chunk owe to it, hence what enters each from its end. Its part
of the gradients is linear, and is added last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.chunk_form import scan_additive
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.layout import ChunkLayout, Segment, chunk_layout
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention import tensor_attention
from seqtrain.kernels.tensor_attention.features import feature_count, features, features_gradient

# Tokens of a step. 4 and 8 take about the same time; 2 and 16 take 1.3 to 3 times as long.
STEP = 8
# Numbers in each of the two running sums of a segment: 512 KiB of float32.
SEGMENT = 1 << 17
SHORTEST, LONGEST = 16, 128


@dataclass(frozen=True)
class _Plan:
    """How a call is run: the polynomial, the layout of its chunks, and the chunks of a segment (about)."""

    degree: int
    scale: float
    layout: ChunkLayout
    limit: int
    products: "Products"

    def segments(self) -> tuple[Segment, ...]:
        return self.layout.segments(self.limit)


@tensor_attention.backend(like=lambda inputs, state: inputs[3].to(state.dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    """See `tensor_attention`; `out` comes back in the state's dtype."""
    return attend(inputs, state, cu_seqlens, scale, degree, Products(_outputs, _gradients, SEGMENT))


@dataclass(frozen=True)
class Products:
    """The loops over the steps of chunks, which a backend may have its own of, and how many chunks they take at once.

    `outputs(piece, sums)`, `gradients(piece, sums, d_out)`: as `_outputs` and `_gradients`. `segment`: numbers in
    each of the two running sums of a segment.
    """

    outputs: Callable[["Piece", Tensor], Tensor]
    gradients: Callable[["Piece", Tensor, Tensor], tuple["Piece", Tensor]]
    segment: int


def attend(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int, products: Products
) -> tuple[Tensor, Tensor]:
    """`run` by the given products."""
    q, v1 = inputs[0], inputs[3]
    batch, tokens, heads, width = q.shape
    if tokens == 0:
        return v1.to(state.dtype), state
    limit = max(1, products.segment // (heads * feature_count(width, degree) * (v1.shape[3] + 1)))
    # The longest chunks of which a segment still has its fill.
    chunk = 1 << (max(SHORTEST, min(LONGEST, batch * tokens // limit)).bit_length() - 1)
    layout = chunk_layout(batch, tokens, cu_seqlens, chunk=chunk, smallest_chunk=SHORTEST, device=q.device)
    return _TensorAttention.apply(*inputs, state, _Plan(degree, scale, layout, limit, products))


@dataclass(frozen=True)
class Piece:
    """Features of queries `[n,L,c,F]` and of both keys `[n,2,L,c,F]`, values with ones `[n,2,L,c,W]`, or gradients.

    n counts the steps of a chunk, L the chunks of a segment times heads. A step lies in one piece, for products of
    batches of matrices want that. Padding has neither values nor ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def steps(self) -> Iterator["Piece"]:
        """The steps, first to last, without dimension n."""
        return (Piece(*step) for step in zip(self.q, self.k, self.v, strict=True))


def _in_steps(rows: Tensor) -> Tensor:
    """`[L,C,X]` -> `[n,L,c,X]`, a copy."""
    return rows.unflatten(1, (-1, STEP)).transpose(0, 1).contiguous()


def from_steps(rows: Tensor) -> Tensor:
    """`[n,L,c,X]` -> `[L,C,X]`."""
    return rows.transpose(0, 1).flatten(1, 2)


class _Pairs:
    """The pairs (t, i), i <= t, of a step's tokens."""

    def __init__(self, like: Tensor):
        self.t, self.i = torch.tril_indices(STEP, STEP, device=like.device)
        token = torch.arange(STEP, device=like.device)
        self.sums = (self.t == token[:, None]).to(like.dtype)  # c P: adds up the pairs of a token
        self.seen = (token <= self.t[:, None]).to(like.dtype)  # P c: the j <= t


def _piece(segment: Segment, inputs: tuple[Tensor, ...], plan: _Plan, dtype: torch.dtype) -> Piece:
    q, k1, k2, v1, v2 = (_in_steps(segment.take(x, dtype)) for x in inputs)
    real = (segment.tokens >= 0).repeat_interleave(inputs[0].shape[2], 0)[..., None]  # L C 1
    real = _in_steps(real.to(dtype))
    return Piece(
        features(q * plan.scale, plan.degree).contiguous(),
        torch.stack([features(k, plan.degree) for k in (k1, k2)], 1),
        torch.stack([torch.cat([v, real], 3) for v in (v1, v2)], 1),
    )


def _add_(sums: Tensor, step: Piece, sign: int = 1) -> None:
    """`sums [2,L,F,W] += sign * phi(k)^T v` over the tokens of `step`."""
    sums.flatten(0, 1).baddbmm_(step.k.flatten(0, 1).transpose(1, 2), step.v.flatten(0, 1), alpha=sign)


def _totals(piece: Piece) -> Tensor:
    """What each chunk adds to the sums, `[2,L,F,W]`."""
    _, two, lanes, _, width = piece.k.shape
    totals = piece.v.new_zeros(two, lanes, width, piece.v.shape[-1])
    for step in piece.steps():
        _add_(totals, step)
    return totals


def _pass_on(totals: Tensor, carry: Tensor, steps: list[tuple[slice, int]]) -> Tensor:
    """What enters each chunk, `[2,L,F,W]`, when `carry [2,N*H,F,W]` enters the first of `steps`; `carry` moves on."""
    enters = torch.empty_like(totals)
    for which in (0, 1):
        scan_additive(carry[which], steps, None, totals[which], enters[which])
    return enters


def _to_carry(state: Tensor) -> Tensor:
    """`[N,H,2,F,W]` -> `[2,N*H,F,W]`, a copy."""
    return state.flatten(0, 1).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _from_carry(carry: Tensor, heads: int) -> Tensor:
    return carry.transpose(0, 1).unflatten(0, (-1, heads)).contiguous()


def _step(sums: Tensor, step: Piece, pairs: _Pairs) -> Tensor:
    """The four terms for the tokens of a step, `[L,c,W]`; `sums`: before it."""
    q = step.q.index_select(1, pairs.t)  # L P F
    v1, v2 = (v.index_select(1, pairs.i) for v in step.v)  # L P W
    x1, x2 = (q * k.index_select(1, pairs.i) for k in step.k)
    both_new = (x1 @ step.k[1].transpose(1, 2)).mul_(pairs.seen)
    through_1 = torch.baddbmm(x1 @ sums[1], both_new, step.v[1])
    of_pairs = torch.addcmul(through_1.mul_(v1), x2 @ sums[0], v2)
    return torch.baddbmm(pairs.sums @ of_pairs, step.q, sums[0] * sums[1])


def _step_gradients(sums: Tensor, step: Piece, pairs: _Pairs, d_out: Tensor, grad: Piece, d_sums: Tensor) -> None:
    """The gradients of `_step`, from `d_out [L,c,W]`, added to those of the step's tokens and of `sums`."""
    t, i = pairs.t, pairs.i
    q = step.q.index_select(1, t)
    k1, k2 = (k.index_select(1, i) for k in step.k)
    x1, x2 = q * k1, q * k2
    both_new = (x1 @ step.k[1].transpose(1, 2)).mul_(pairs.seen)
    through_1 = torch.baddbmm(x1 @ sums[1], both_new, step.v[1])
    through_2 = x2 @ sums[0]

    d_pairs = d_out.index_select(1, t)  # L P W
    d_product = step.q.transpose(1, 2) @ d_out
    d_1, d_2 = (d_pairs * v.index_select(1, i) for v in step.v)  # of through_1 and through_2
    d_sums[0].addcmul_(d_product, sums[1]).baddbmm_(x2.transpose(1, 2), d_2)
    d_sums[1].addcmul_(d_product, sums[0]).baddbmm_(x1.transpose(1, 2), d_1)
    d_both_new = (d_1 @ step.v[1].transpose(1, 2)).mul_(pairs.seen)
    d_x1 = torch.baddbmm(d_1 @ sums[1].transpose(1, 2), d_both_new, step.k[1])
    d_x2 = d_2 @ sums[0].transpose(1, 2)

    grad.q.baddbmm_(d_out, (sums[0] * sums[1]).transpose(1, 2))
    grad.q.index_add_(1, t, torch.addcmul(d_x1 * k1, d_x2, k2))
    grad.k[0].index_add_(1, i, d_x1.mul_(q))
    grad.k[1].index_add_(1, i, d_x2.mul_(q))
    grad.k[1].baddbmm_(d_both_new.transpose(1, 2), x1)
    grad.v[0].index_add_(1, i, through_1.mul_(d_pairs))
    grad.v[1].index_add_(1, i, through_2.mul_(d_pairs))
    grad.v[1].baddbmm_(both_new.transpose(1, 2), d_1)


def _outputs(piece: Piece, sums: Tensor) -> Tensor:
    """Numerators and sums of weights, `[L,C,W]`, from the sums before each chunk (spoiled)."""
    pairs = _Pairs(piece.q)
    rows = []
    for step in piece.steps():
        rows.append(_step(sums, step, pairs))
        _add_(sums, step)
    return from_steps(torch.stack(rows))


def _through_sums_(grad: Piece, step: Piece, d_sums: Tensor) -> None:
    """Adds to a step's gradients what its keys and values owe to later sums, whose gradient is `d_sums [2,L,F,W]`."""
    k, v, d_sums = step.k.flatten(0, 1), step.v.flatten(0, 1), d_sums.flatten(0, 1)
    grad.k.flatten(0, 1).baddbmm_(v, d_sums.transpose(1, 2))
    grad.v.flatten(0, 1).baddbmm_(k, d_sums)


def _gradients(piece: Piece, sums: Tensor, d_out: Tensor) -> tuple[Piece, Tensor]:
    """Gradients from within each chunk: of its piece, and of the sums before it, `[2,L,F,W]`.

    `sums`: after each chunk (spoiled). `d_out`: `[n,L,c,W]`.
    """
    pairs = _Pairs(piece.q)
    grad = Piece(*(torch.zeros_like(x) for x in (piece.q, piece.k, piece.v)))
    d_sums = torch.zeros_like(sums)
    for step, d_rows, step_grad in reversed(list(zip(piece.steps(), d_out, grad.steps(), strict=True))):
        _add_(sums, step, -1)
        _through_sums_(step_grad, step, d_sums)
        _step_gradients(sums, step, pairs, d_rows, step_grad, d_sums)
    return grad, d_sums


class _TensorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, state, plan = arguments
        out, weight, final, checkpoints = _forward(tuple(inputs), state, plan)
        ctx.save_for_backward(*inputs, out, weight, *checkpoints)
        ctx.plan = plan
        return out, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k1, k2, v1, v2, out, weight, *checkpoints = ctx.saved_tensors
        d_out, d_final = grads
        with full_precision(d_out.device):
            d_inputs = _backward(d_out, d_final, (q, k1, k2, v1, v2), out, weight, checkpoints, ctx.plan)
        return *d_inputs, None


def _forward(inputs: tuple[Tensor, ...], state: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Output `[B,T,H,V]`, sums of weights `[B,T,H,1]`, final state, and the sums before each segment."""
    heads, v1 = state.shape[1], inputs[3]
    out = torch.empty(v1.shape, dtype=v1.dtype, device=v1.device)
    weight = torch.empty(*v1.shape[:3], 1, dtype=state.dtype, device=v1.device)
    carry = _to_carry(plan.layout.sort_states(state))
    checkpoints = []
    for segment in plan.segments():
        piece = _piece(segment, inputs, plan, state.dtype)
        # Later segments have fewer documents: those that have ended are not kept again.
        checkpoints.append(carry[:, : segment.counts[0] * heads].clone())
        rows = plan.products.outputs(piece, _pass_on(_totals(piece), carry, segment.steps(heads)))
        segment.put(out, rows[..., :-1] / rows[..., -1:])
        segment.put(weight, rows[..., -1:])
    return out, weight, plan.layout.restore_states(_from_carry(carry, heads)), checkpoints


def _backward(
    d_out: Tensor,
    d_final: Tensor,
    inputs: tuple[Tensor, ...],
    out: Tensor,
    weight: Tensor,
    checkpoints: list[Tensor],
    plan: _Plan,
) -> list[Tensor]:
    """Gradients of the five inputs and of the initial state."""
    dtype, heads = weight.dtype, weight.shape[2]
    inverse = weight.reciprocal()
    d_carry = _to_carry(plan.layout.sort_states(d_final))
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    for segment, before in reversed(list(zip(plan.segments(), checkpoints, strict=True))):
        steps = segment.steps(heads)
        piece = _piece(segment, inputs, plan, dtype)
        totals = _totals(piece)
        ends = totals.add_(_pass_on(totals, before.clone(), steps))
        rows = segment.take(d_out, dtype)  # L C V
        ratio = (rows * segment.take(out, dtype)).sum(-1, keepdim=True)
        d_rows = torch.cat([rows, -ratio], -1).mul_(segment.take(inverse, dtype))
        grad, d_sums = plan.products.gradients(piece, ends, _in_steps(d_rows))
        d_ends = _pass_on(d_sums, d_carry, steps[::-1])
        for step, step_grad in zip(piece.steps(), grad.steps(), strict=True):
            _through_sums_(step_grad, step, d_ends)
        _put_gradients(segment, inputs, grads, grad, plan)
    return [*grads, plan.layout.restore_states(_from_carry(d_carry, heads))]


def _put_gradients(segment: Segment, inputs: tuple[Tensor, ...], grads: list[Tensor], grad: Piece, plan: _Plan) -> None:
    """Gradients of the features and values of a segment -> of its inputs, written where its tokens lie."""
    factors = (plan.scale, 1.0, 1.0)
    for x, d_phi, out, factor in zip(inputs, (grad.q, *grad.k.unbind(1)), grads, factors, strict=False):
        rows = _in_steps(segment.take(x, d_phi.dtype)) * factor
        segment.put(out, from_steps(features_gradient(rows, d_phi, plan.degree) * factor))
    for d_v, out in zip(grad.v.unbind(1), grads[3:], strict=True):
        segment.put(out, from_steps(d_v[..., :-1]))
