"""flash-attn on CUDA: its windows, grouped heads and packed documents; in float16 and bfloat16, else SDPA."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.softmax_attention import chunked
from seqtrain.kernels.softmax_attention.past import Past, joined


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return None if importlib.util.find_spec("flash_attn") else "needs flash-attn: pip install 'seqtrain[flash]'"


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
    ragged = past is not None and cu_seqlens is None and min(past.lengths) < past.k.shape[1]
    # Rows with pasts of different lengths are a case of decoding only; SDPA's mask serves it.
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] != v.shape[3] or ragged:
        return chunked.run(q, k, v, window, scale, cap, past, cu_seqlens)
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # flash-attn counts the keys to the left of a query, its own not included, and aligns the last query with the last
    # key.
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"softmax_scale": scale, "softcap": cap, "causal": True}
    options["window_size"] = (left, 0 if window else -1)
    if past is not None:
        k, v = joined(k, past.k, past, cu_seqlens), joined(v, past.v, past, cu_seqlens)
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **options)
    queries = cu_seqlens.to(device=q.device, dtype=torch.int32)
    keys = queries
    if past is not None:
        keys = queries + torch.nn.functional.pad(past.length.cumsum(0), (1, 0)).to(queries)
    out = flash_attn_varlen_func(
        q[0],
        k[0],
        v[0],
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=int(queries.diff().max()),
        max_seqlen_k=int(keys.diff().max()),
        **options,
    )
    return out[None]
