"""The definition: one masked softmax over all keys."""

from itertools import pairwise

import torch
from torch import Tensor

from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.softmax_attention.past import Past


def run(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, past: Past | None, cu_seqlens: Tensor | None
) -> Tensor:
    """See `softmax_attention`; returns `out` alone."""
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
        outs.append(_attend(q[:, start:end], keys, values, window, scale, torch.tensor(skip, device=q.device)))
    return torch.cat(outs, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, skip: Tensor) -> Tensor:
    """`q [B,T,H,K]` are the last T of `k [B,S,G,K]`, `v [B,S,G,V]`; the first `skip [B]` keys count for nothing."""
    dtype, repeat = state_dtype(q.dtype), q.shape[2] // k.shape[2]
    k, v = (rows.to(dtype).repeat_interleave(repeat, 2) for rows in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q.to(dtype), k) * scale
    key = torch.arange(k.shape[1], device=q.device)
    query = key[k.shape[1] - q.shape[1] :, None]
    seen = (key <= query) if window is None else (key <= query) & (key > query - window)
    seen = seen & (key >= skip[:, None, None])  # B T S
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v).to(q.dtype)
