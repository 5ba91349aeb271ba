"""Softmax attention by the native CPU kernels: products at the rate of matrix products, nothing masked looked at."""

import ctypes
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import Array, by_token, check, fields, find_boundaries
from seqtrain.kernels.softmax_attention import chunked
from seqtrain.kernels.softmax_attention.past import Past, joined

__all__ = ["run", "unavailable"]

# Queries of a row below which PyTorch's attention is taken: blocks of them would be mostly padding.
LEAST_QUERIES = 16
_QUERIES = 96  # kQueries in attention.cpp


class _Call(ctypes.Structure):
    """`AttentionCall` of attention.cpp."""

    _fields_ = fields(
        "q k v out d_out d_q d_k d_v",
        "sums boundaries keys",
        "documents tokens key_tokens heads groups key value window parts threads",
        "scale cap",
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cap: float,
    past: Past | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `softmax_attention`; returns `out` alone."""
    if not _serves(q, k, v, cu_seqlens):
        return chunked.run(q, k, v, window, scale, cap, past, cu_seqlens)
    places = None
    if past is not None:
        k, v = joined(k, past.k, past, cu_seqlens), joined(v, past.v, past, cu_seqlens)
        places = _key_places(past, q.shape[1], cu_seqlens)
    return _operator(q, k, v, cu_seqlens, places, window or 0, scale, cap)[0]


def _serves(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the library takes a call, and is faster. Products under autocast are PyTorch's, in bfloat16."""
    return (
        {q.dtype, k.dtype, v.dtype} <= {torch.float32}
        and not torch.is_autocast_enabled("cpu")
        and (cu_seqlens is not None or q.shape[1] >= LEAST_QUERIES)
        and 0 not in (q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    )


def _key_places(past: Past, tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """The first of each document's keys, and the one behind the last, among those of all rows: int64 `[N,2]`."""
    if cu_seqlens is None:
        rows = past.k.shape[1] + tokens
        ends = [rows * (n + 1) for n in range(len(past.lengths))]
        return torch.tensor([(end - tokens - length, end) for end, length in zip(ends, past.lengths, strict=True)])
    counts = [old + new for old, new in zip(past.lengths, cu_seqlens.diff().tolist(), strict=True)]
    return torch.tensor(list(pairwise(accumulate(counts, initial=0))))


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`(out, sums)`; sums `[B,T,H]`: the logarithm of the sum of the exponentials of each query's scores."""
    out, sums = _shapes(q, *arguments)
    call, _kept = _describe(q, *arguments)
    # Each part packs the keys it sees, which is little beside what it does with them.
    wanted = -(-4 * call.threads // (call.documents * call.groups)) if call.threads > 1 else 1
    call.parts = max(1, min(wanted, q.shape[1] // (4 * _QUERIES)))
    call.out, call.sums = Array.of(out), sums.data_ptr()
    check(library().seqtrain_attention_forward(ctypes.byref(call)))
    return out, sums


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    q, k, v = arguments[:3]
    out, sums = kept
    call, _kept = _describe(*arguments)
    [d_out] = by_token(gradients[0])
    # Where groups are fewer than threads, each head has its own part of the gradients of keys and values.
    call.parts = call.heads // call.groups if call.documents * call.groups < call.threads else 1
    # What no query sees, as before a row's past, is left as it is.
    like = torch.empty if arguments[4] is None else torch.zeros
    d_q = torch.zeros(q.shape, dtype=torch.float32)
    d_k, d_v = (like(call.parts, *x.shape, dtype=x.dtype if call.parts == 1 else torch.float32) for x in (k, v))
    call.out, call.d_out, call.sums = Array.of(out), Array.strided(d_out), sums.data_ptr()
    call.d_q, call.d_k, call.d_v = (Array.of(x) for x in (d_q, d_k, d_v))
    check(library().seqtrain_attention_backward(ctypes.byref(call)))
    d_k, d_v = (x[0] if call.parts == 1 else x.sum(0) for x in (d_k, d_v))
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None, None


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    places: Tensor | None,
    window: int,
    scale: float,
    cap: float,
) -> tuple[_Call, Any]:
    """The call, and what must outlive it."""
    q, k, v = by_token(q, k, v)
    boundaries = find_boundaries(q, cu_seqlens)
    if places is None:
        places = torch.stack([boundaries[:-1], boundaries[1:]], 1)
    call = _Call(scale=scale, cap=cap, window=window, threads=torch.get_num_threads())
    call.q, call.k, call.v = (Array.strided(x) for x in (q, k, v))
    call.documents, call.boundaries, call.keys = len(places), boundaries.data_ptr(), places.data_ptr()
    call.tokens, call.key_tokens = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    call.heads, call.groups, call.key, call.value = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    return call, (q, k, v, boundaries, places)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? places, SymInt window, float scale, float cap) "
    "-> (Tensor, Tensor)"
)
_operator = differentiable(
    "softmax_attention_native", _forward, _backward, _shapes, results=1, keep_results=True, schema=_SCHEMA
)
