"""Causal softmax attention, full or over a sliding window, with grouped heads, packed documents and a state."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_documents
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.linear_cross_entropy import soft_cap
from seqtrain.kernels.operator import operator
from seqtrain.kernels.segments import PastKeys
from seqtrain.kernels.softmax_attention.largest import attend as attend_to_largest
from seqtrain.kernels.softmax_attention.past import Past, check_past, kept, pairs_seen

__all__ = ["softmax_attention"]


def _states(*, T: int, G: int, K: int, V: int, window: int | None = None, **_: Any) -> dict[str, tuple[int, ...]]:
    rows = T if window is None else window - 1
    return {"k": (rows, G, K), "v": (rows, G, V), "length": ()}


@operator(
    arguments={"q": "B T H K", "k": "B T G K", "v": "B T G V"},
    out="B T H V",
    state=_states,
    state_from=("k",),
    state_dtype=lambda dtype: dtype,
    flops=lambda *, B, T, H, K, V, window=None, **_: 2 * B * H * (K + V) * pairs_seen(T, window),
    backends=("reference", "chunked", "native", "flash"),
    time=PastKeys(),
)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    score_cap: float = 0.0,
    kept_keys: int = 0,
    predict_width: int = 0,
    initial_state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`out_t = sum_s softmax_s(scale * q_t . k_s) v_s` over the last `window` tokens s <= t of t's document.

    `q`: `[B,T,H,K]`. `k`: `[B,T,G,K]`, `v`: `[B,T,G,V]`, floating, with H a multiple of G: query heads `h*H/G ...
    (h+1)*H/G - 1` share key head h. `window`: keys a query sees, its own included; None for all. `scale` defaults to
    `K ** -0.5`. `score_cap`: what is exponentiated is `score_cap * tanh(scale * q_t . k_s / score_cap)` (Gemma 2, arXiv
    2408.00118, section 2); 0: as it is.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1). `kept_keys`: where one token a row is
    decoded, without gradients, each head reads only so many of the keys, those that the first `predict_width` channels
    score highest (Spark, arXiv 2506.06644); 0: all, as under a window and wherever there are several tokens.

    The state is what continuing needs: `dict(k=[B,S,G,K], v=[B,S,G,V], length=int64 [B])`. The last `length` of the S
    rows are the latest keys and values; the rows before them count for nothing. With a window S is always `window - 1`,
    without it S is the number of tokens seen. With documents the rows of all documents lie one after the other without
    padding: `dict(k=[1,sum(length),G,K], v=[1,sum(length),G,V], length=int64 [N])`. It has the inputs' dtype.

    Returns `out`, `[B,T,H,V]` in v's dtype, and the state after the last token. Raises `ValueError` for a wrong shape,
    dtype, device, window, cap or backend. Backends: `reference`, `chunked` (PyTorch's SDPA, capped by plain PyTorch;
    linear in T under a window), `native` (float32 on CPUs), `flash` (flash-attn, on CUDA, for float16 and bfloat16).
    """
    name = "softmax_attention"
    sizes = softmax_attention.check((q, k, v))
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{name}: q has H={sizes['H']} heads, expected a multiple of k's G={sizes['G']}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window}, expected at least 1 key or None")
    if score_cap < 0:
        raise ValueError(f"{name}: score_cap={score_cap}, expected 0 or more")
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    past = check_past(initial_state, k, v, states, cu_seqlens is not None)
    if scale is None:
        scale = sizes["K"] ** -0.5
    decoding = sizes["T"] == 1 and window is None and cu_seqlens is None and not torch.is_grad_enabled()
    if kept_keys and decoding:
        after = kept(k, v, window, past, None)
        held = after["k"], after["v"], after["length"]
        out = attend_to_largest(q, *held, scale=scale, cap=score_cap, kept=kept_keys, width=predict_width)
        return out, after
    run = softmax_attention.choose(backend, q.device)
    out = run(q, k.to(q.dtype), v.to(q.dtype), window, scale, score_cap, past, cu_seqlens)
    return out.to(v.dtype), kept(k, v, window, past, cu_seqlens)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cap: float,
    past: Past | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The definition: one masked softmax over all keys; returns `out` alone."""
    tokens = q.shape[1]
    boundaries = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = None if past is None else list(past.lengths)
    outs = []
    for n, (start, end) in enumerate(pairwise(boundaries)):
        keys, values, skip = k[:, start:end], v[:, start:end], [0] * q.shape[0]
        if past is not None and lengths is not None:
            first = 0 if cu_seqlens is None else sum(lengths[:n])
            rows = slice(None) if cu_seqlens is None else slice(first, first + lengths[n])
            keys, values = torch.cat([past.k[:, rows], keys], 1), torch.cat([past.v[:, rows], values], 1)
            skip = [past.k.shape[1] - length for length in lengths] if cu_seqlens is None else [0]
        hidden = torch.tensor(skip, device=q.device)
        outs.append(_attend(q[:, start:end], keys, values, window, scale, cap, hidden))
    return torch.cat(outs, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cap: float, skip: Tensor) -> Tensor:
    """`q [B,T,H,K]` are the last T of `k [B,S,G,K]`, `v [B,S,G,V]`; the first `skip [B]` keys count for nothing."""
    dtype, repeat = state_dtype(q.dtype), q.shape[2] // k.shape[2]
    k, v = (rows.to(dtype).repeat_interleave(repeat, 2) for rows in (k, v))
    scores = soft_cap(torch.einsum("bthk,bshk->bhts", q.to(dtype), k) * scale, cap)
    key = torch.arange(k.shape[1], device=q.device)
    query = key[k.shape[1] - q.shape[1] :, None]
    seen = (key <= query) if window is None else (key <= query) & (key > query - window)
    seen = seen & (key >= skip[:, None, None])  # B T S
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v).to(q.dtype)
