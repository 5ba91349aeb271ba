"""PyTorch's fused attention on pieces chosen so that no mask grows with T.

A window of w keys: blocks of w queries see their own block and the one before through one `[w, 2w]` mask for all
blocks. Packed documents: long ones one by one, short ones side by side in batches of similar length, where causality
hides the padding.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import boundaries_of
from seqtrain.kernels.softmax_attention.blocks import ALONE, attend_capped, packed, same_width
from seqtrain.kernels.softmax_attention.past import Past

# Queries in a block where a given past makes a mask necessary.
MASKED_QUERIES = 512


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
    if cu_seqlens is None:
        return _rows(q, k, v, window, scale, cap, past)
    if past is None:
        return _documents(q, k, v, window, scale, cap, cu_seqlens)[0]
    outs, first = [], 0
    for n, (start, end) in enumerate(pairwise(boundaries_of(cu_seqlens))):
        rows = slice(first, first + past.lengths[n])
        mine = Past(past.k[:, rows], past.v[:, rows], past.length[n : n + 1], past.lengths[n : n + 1])
        outs.append(_rows(q[:, start:end], k[:, start:end], v[:, start:end], window, scale, cap, mine))
        first = rows.stop
    return torch.cat(outs, 1)


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cap: float, past: Past | None) -> Tensor:
    """Separate rows `[B,T,...]`, without documents."""
    tokens = q.shape[1]
    if tokens == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    if window is None or tokens <= window:
        return _whole(q, k, v, window, scale, cap, past)
    body = tokens // window * window
    outs = [_whole(q[:, :window], k[:, :window], v[:, :window], window, scale, cap, past)]
    # Query i of a block is key i + window of the two blocks it sees.
    query = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    band = (key > query) & (key <= query + window)
    if body > window:
        queries = q[:, window:body].unflatten(1, (-1, window)).flatten(0, 1)  # B*N w H K
        keys, values = (_overlapping(rows[:, :body], window) for rows in (k, v))  # B*N 2w G K
        outs.append(_attend(queries, keys, values, scale, cap, band).unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    if body < tokens:
        rest, seen = tokens - body, slice(body - window, None)
        outs.append(_attend(q[:, body:], k[:, seen], v[:, seen], scale, cap, band[:rest, : window + rest]))
    return torch.cat(outs, 1)


def _overlapping(rows: Tensor, window: int) -> Tensor:
    """`[B, (N+1)*w, G, K]` -> `[B*N, 2w, G, K]`: each block with the one before; a view for B == 1."""
    return rows.unfold(1, 2 * window, window).permute(0, 1, 4, 2, 3).flatten(0, 1)


def _whole(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cap: float, past: Past | None) -> Tensor:
    """Causal attention over the past and at most `window` new tokens (any number without a window)."""
    if past is None:
        return _attend(q, k, v, scale, cap, "causal")
    k, v = torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)
    old, tokens = past.k.shape[1], q.shape[1]
    ragged = min(past.lengths) < old
    outs = []
    for start in range(0, tokens, MASKED_QUERIES):
        end = min(start + MASKED_QUERIES, tokens)
        first = 0 if window is None else max(0, old + start - window + 1)
        key = torch.arange(first, old + end, device=q.device)
        query = torch.arange(old + start, old + end, device=q.device)[:, None]
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        if ragged:
            seen = seen & (key >= (old - past.length)[:, None, None, None])  # B 1 R S
        # A single query sees every key there is.
        mask = None if end - start == 1 and not ragged else seen
        keys = slice(first, old + end)
        outs.append(_attend(q[:, start:end], k[:, keys], v[:, keys], scale, cap, mask))
    return torch.cat(outs, 1)


@opaque("softmax_attention_documents", like=lambda q, k, v, *_: (v.new_empty(*q.shape[:3], v.shape[3]),))
def _documents(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cap: float, cu_seqlens: Tensor
) -> tuple[Tensor]:
    """`(out,)` of documents of one packed row, nothing before them."""
    boundaries = boundaries_of(cu_seqlens)
    if len(boundaries) == 2:
        # Of one document nothing is put together again, which would copy it twice.
        return (_rows(q, k, v, window, scale, cap, None),)
    documents, outs = packed(boundaries, ALONE if window is None else min(ALONE, window + 1)), []
    places = [torch.arange(rows.start, rows.stop, device=q.device) for rows in documents.alone]
    for rows in documents.alone:
        outs.append(_rows(q[:, rows], k[:, rows], v[:, rows], window, scale, cap, None)[0])
    for index, real in documents.batches(q.device):
        outs.append(_attend(q[0][index], k[0][index], v[0][index], scale, cap, "causal")[real])
        places.append(index[real])
    out = q.new_empty(q.shape[1], q.shape[2], v.shape[3])
    if outs:
        out = out.index_copy(0, torch.cat(places), torch.cat(outs))
    return (out[None],)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, mask: Tensor | str | None) -> Tensor:
    """SDPA on `[B,T,H,K]`; `mask`: True where a key is seen, `"causal"`, or None for every key."""
    if cap:
        causal = isinstance(mask, str)
        return attend_capped(q, k, v, None if causal else mask, causal, scale, cap)[0]
    value_width, grouped = v.shape[3], q.shape[2] != k.shape[2]
    # Without the fused kernels SDPA holds all T*T scores.
    q, k, v = (rows.transpose(1, 2) for rows in same_width(q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask if isinstance(mask, Tensor) else None,
        is_causal=mask == "causal" if isinstance(mask, str) else False,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)[..., :value_width]
