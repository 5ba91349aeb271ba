"""The scan in two passes over chunks that run side by side; the backward is the same scan in reverse.

T tokens are N chunks of C. First every chunk finds its total decay and the h it would end with, keeping only these;
then the scan over the N chunks (the same function again) gives what enters each; then every chunk runs from there. Each
step is one fused multiply-add over N*D numbers, so there are 3C steps and a short scan instead of T. Where a document
starts, what comes is set to zero: times a decay of zero, an infinite state would be NaN. Decays are only ever
multiplied, never divided, so they may be as strong as they like.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.diagonal_scan import diagonal_scan
from seqtrain.kernels.operator import Inputs

# Up to this many tokens a plain loop is the fastest.
LOOP = 48
# Steps of a chunk; 16 to 128 are within 1.5 times of each other at T=1024 to 16384, D=512.
CHUNK = 32


@diagonal_scan.backend(like=lambda inputs, state: inputs[0].to(state.dtype) if state.is_complex() else inputs[0])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`."""
    x, log_a = inputs
    out_dtype = state.dtype if state.is_complex() else x.dtype
    if x.shape[1] == 0:
        return x.to(out_dtype), state
    if cu_seqlens is None:
        return _DiagonalScan.apply(x, log_a, state, out_dtype, None)
    boundaries = cu_seqlens.to(device=x.device, dtype=torch.int64)
    full = (boundaries.diff() > 0).nonzero()[:, 0]
    out, last = _DiagonalScan.apply(x, log_a, state[full], out_dtype, (boundaries[full], boundaries[full + 1] - 1))
    return out, state.index_copy(0, full, last)


def recurrence_(h: Tensor, a: Tensor, *, resets: Sequence[int] = (), reverse: bool = False) -> None:
    """In place `h_t += a_t * h_{t-1}` (`reverse`: `h_t += a_t * h_{t+1}`) along dimension 1, from a zero state.

    `h`, `a`: `[B,T,...]`, of one shape and dtype. `resets`: the tokens that nothing enters, where a is zero.
    """
    tokens = h.shape[1]
    body = 0 if tokens <= LOOP else tokens // CHUNK * CHUNK
    of_chunks = [t for t in resets if t < body]
    rest = {t - body for t in resets if t >= body}
    if reverse:
        _loop_(h[:, body:], a[:, body:], None, rest, reverse)
        if body:
            after = h[:, body] if body < tokens else None
            _chunks_(h[:, :body], a[:, :body], after, of_chunks, reverse)
    else:
        if body:
            _chunks_(h[:, :body], a[:, :body], None, of_chunks, reverse)
        _loop_(h[:, body:], a[:, body:], h[:, body - 1] if body else None, rest, reverse)


def _loop_(h: Tensor, a: Tensor, entering: Tensor | None, resets: set[int], reverse: bool) -> None:
    """`recurrence_` step by step; `entering`: h just before the first token (after the last, in reverse)."""
    for t in reversed(range(h.shape[1])) if reverse else range(h.shape[1]):
        if entering is not None and t not in resets:
            h[:, t].addcmul_(a[:, t], entering)
        entering = h[:, t]


def _chunks_(h: Tensor, a: Tensor, entering: Tensor | None, resets: list[int], reverse: bool) -> None:
    """`recurrence_` of so many tokens that they are whole chunks."""
    h, a = h.unflatten(1, (-1, CHUNK)), a.unflatten(1, (-1, CHUNK))  # B N C
    places = torch.tensor(resets, dtype=torch.int64, device=h.device)
    # By step, the chunks that reset there.
    at = {c: places[places % CHUNK == c] // CHUNK for c in {t % CHUNK for t in resets}}
    steps = list(reversed(range(CHUNK)) if reverse else range(CHUNK))
    decay, end = a[:, :, steps[0]].clone(), h[:, :, steps[0]].clone()
    for c in steps[1:]:
        if c in at:
            end.index_fill_(1, at[c], 0)
            decay.index_fill_(1, at[c], 0)
        end = torch.addcmul(h[:, :, c], a[:, :, c], end)
        decay *= a[:, :, c]
    edge = -1 if reverse else 0
    chunks = sorted({t // CHUNK for t in resets})
    if entering is not None and edge % h.shape[1] not in chunks:
        end[:, edge].addcmul_(decay[:, edge], entering)
    recurrence_(end, decay, resets=chunks, reverse=reverse)
    enters = torch.zeros_like(end)
    if reverse:
        enters[:, :-1] = end[:, 1:]
    else:
        enters[:, 1:] = end[:, :-1]
    if entering is not None:
        enters[:, edge] = entering
    for c in steps:
        if c in at:  # what entered the step is kept: it is h of the step before
            enters = enters.index_fill(1, at[c], 0)
        enters = h[:, :, c].addcmul_(a[:, :, c], enters)


def decay_of(log_a: Tensor, dtype: torch.dtype) -> Tensor:
    """`exp(log_a)` in the scan's dtype. By sine and cosine: a third of the time of ATen's complex exp."""
    log_a = log_a.to(torch.promote_types(log_a.dtype, torch.float32))
    a = torch.polar(log_a.real.exp(), log_a.imag) if log_a.is_complex() else log_a.exp()
    return a.to(dtype)


def _first_and_last(rows: tuple[Tensor, Tensor] | None) -> tuple[Any, Any]:
    """Indices of the first and the last token: of every row, or of every document of the one row."""
    if rows is None:
        return (slice(None), 0), (slice(None), -1)
    return (0, rows[0]), (0, rows[1])


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_a: Tensor, state: Tensor, out_dtype: torch.dtype, rows: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        first, last = _first_and_last(rows)
        h = x.to(state.dtype, copy=True)
        a = decay_of(log_a, state.dtype)
        a = a.expand(x.shape).contiguous() if log_a.dim() == 1 else a
        h[first] += a[first] * state
        a[first] = 0
        recurrence_(h, a, resets=() if rows is None else rows[0].tolist())
        final = h[last].clone()
        out = h.to(out_dtype)
        ctx.save_for_backward(out, log_a, state)
        ctx.rows, ctx.x_dtype = rows, x.dtype
        return out, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        out, log_a, state = ctx.saved_tensors
        d_out, d_final = grads
        dx, d_log_a, d_state = _gradients(d_out, d_final, out, log_a, state, ctx.rows)
        dx = dx if ctx.x_dtype.is_complex or not dx.is_complex() else dx.real
        return dx.to(ctx.x_dtype), d_log_a, d_state, None, None


def _gradients(
    d_out: Tensor, d_final: Tensor, out: Tensor, log_a: Tensor, state: Tensor, rows: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in the scan's dtype), log_a and the initial state: `g_t = d_out_t + conj(a_{t+1}) g_{t+1}`."""
    first, last = _first_and_last(rows)
    g = d_out.to(state.dtype, copy=True)
    g[last] += d_final
    a = decay_of(log_a, state.dtype).conj().resolve_conj().expand(out.shape)
    following = torch.empty_like(g)  # conj(a_{t+1})
    following[:, :-1] = a[:, 1:]
    following[last] = 0
    starting = a[first].clone()
    del a
    recurrence_(g, following, resets=() if rows is None else rows[1].tolist(), reverse=True)
    entering = starting * g[first]
    # a_t h_{t-1} is what the decay scaled: no division by a.
    d_log_a = torch.empty_like(g)
    torch.mul(following[:, :-1], g[:, 1:], out=d_log_a[:, 1:])
    d_log_a[:, 1:] *= out[:, :-1].conj()
    d_log_a[first] = entering * state.conj()
    if not log_a.is_complex() and d_log_a.is_complex():
        d_log_a = d_log_a.real
    if log_a.dim() == 1:
        d_log_a = d_log_a.sum((0, 1))
    return g, d_log_a.to(log_a.dtype), entering
