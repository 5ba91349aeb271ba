"""Decoding that reads few keys: those that a part of the channels says the query agrees with most (Spark)."""

import torch
from torch import Tensor

from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.linear_cross_entropy import soft_cap


def attend(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, scale: float, cap: float, kept: int, width: int
) -> Tensor:
    """One token a row, `q: [B,1,H,K]`, over the last `length: [B]` of keys `[B,S,G,K]` and values `[B,S,G,V]`.

    Each head's softmax is over the `kept` keys whose first `width` channels score highest (arXiv 2506.06644); the
    others' remaining channels and values are not read. Returns `[B,1,H,V]`.
    """
    dtype, tokens, groups = state_dtype(q.dtype), k.shape[1], k.shape[2]
    asked = q[:, 0].unflatten(1, (groups, -1))  # B G H/G K
    guessed = torch.einsum("bghr,bsgr->bghs", asked[..., :width], k[..., :width])
    token = torch.arange(tokens, device=q.device)
    seen = (token >= tokens - length[:, None])[:, None, None]  # B 1 1 S
    chosen = guessed.masked_fill(~seen, -torch.inf).topk(min(kept, tokens), -1).indices  # B G H/G n
    rows = torch.arange(k.shape[0], device=q.device).view(-1, 1, 1, 1)
    heads = torch.arange(groups, device=q.device).view(-1, 1, 1)
    keys, values = k[rows, chosen, heads].to(dtype), v[rows, chosen, heads].to(dtype)  # B G H/G n K
    scores = soft_cap(torch.einsum("bghk,bghnk->bghn", asked.to(dtype), keys) * scale, cap)
    scores = scores.masked_fill(~seen.expand_as(guessed).gather(3, chosen), -torch.inf)
    read = torch.einsum("bghn,bghnv->bghv", scores.softmax(-1), values)
    return read.flatten(1, 2)[:, None].to(v.dtype)
