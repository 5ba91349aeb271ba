"""PyTorch: blocks of about a window's length see themselves and the block before, and their documents' sinks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.rows import Rows
from seqtrain.kernels.sink_attention import Known

# Queries in a block at least: below it, the cost of a block outweighs its work.
BLOCK = 16


@dataclass(frozen=True)
class Layout:
    """M groups of Q queries with the S keys each group looks at.

    `query`: int64 `[M,Q]`, numbers of flat tokens. `key`: int64 `[M,S]`, numbers among the past rows of all pieces
    followed by the flat tokens. `seen`: bool `[M,Q,S]`. `back`: int64 `[total]`, each token's number among the queries.
    """

    query: Tensor
    key: Tensor
    seen: Tensor
    back: Tensor


def run(inputs: Inputs, window: int, scale: float, known: Known) -> Tensor:
    """Flat inputs, `q: [total,H,K]`; see `sink_attention`. Returns `out` alone, `[total,H,V]`."""
    q, k, v, extra_score, extra_value = inputs
    total, heads = q.shape[:2]
    if total == 0:
        return q.new_empty(0, heads, v.shape[2])
    dtype = state_dtype(q.dtype)
    piece, offset = known.rows.places(total)
    place = offset + known.past["length"][piece]
    layout = _layout(known, window, total)
    if not known.fresh:
        k, v = (torch.cat([known.past[key].flatten(0, 1), new]) for key, new in (("k", k), ("v", v)))
    with full_precision(q.device):
        grouped = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1))[layout.query]  # M Q G R K
        hidden = torch.finfo(dtype).min
        near = torch.einsum("mqgrk,msgk->mgrqs", grouped, k.to(dtype)[layout.key])
        # Not -inf: the queries that fill up a block see nothing, and must not make gradients NaN.
        scores = [near.masked_fill(~layout.seen[:, None, None], hidden)]
        values = [(v.to(dtype)[layout.key], "mgrqs,msgv->mqgrv")]
        if sinks := known.after["sink_k"].shape[1]:
            owner = piece[layout.query]  # M Q
            first = torch.einsum("mqgrk,mqsgk->mgrqs", grouped, known.after["sink_k"].to(dtype)[owner])
            # A sink inside the window is among the keys already.
            far = place[layout.query][..., None] >= window + torch.arange(sinks, device=q.device)
            scores.append(first.masked_fill(~far[:, None, None], hidden))
            values.append((known.after["sink_v"].to(dtype)[owner], "mgrqs,mqsgv->mqgrv"))
        if extra_score is not None and extra_value is not None:
            extra = extra_score.to(dtype).unflatten(1, (k.shape[1], -1))[layout.query]  # M Q G R
            scores.append(extra.permute(0, 2, 3, 1)[..., None])
            value = extra_value.to(dtype).unflatten(1, (k.shape[1], -1))[layout.query]  # M Q G R V
            values.append((value[:, :, None], "mgrqs,mqsgrv->mqgrv"))
        weights = torch.cat(scores, -1).softmax(-1).split([score.shape[-1] for score in scores], -1)
        parts = [torch.einsum(sums, weight, value) for weight, (value, sums) in zip(weights, values, strict=True)]
        out = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return out.flatten(0, 1).flatten(1, 2)[layout.back]


def _layout(known: Known, window: int, total: int) -> Layout:
    rows, held = known.rows, 0 if known.fresh else window - 1
    pieces, device = rows.start.shape[0], rows.start.device
    if total == pieces and bool((rows.length == 1).all()):
        return _one_token_each(known.past["length"], held)
    piece, number = Rows(rows.start + held * torch.arange(pieces, device=device), rows.length + held).places(
        total + held * pieces
    )
    # A token's distance from its piece's first new one: negative in the past.
    number = number - held
    key = torch.where(number < 0, (piece + 1) * held + number, held * pieces + rows.start[piece] + number)
    query = (rows.start[piece] + number).clamp(0, total - 1)
    alive = number >= -known.past["length"][piece]
    back = (number >= 0).nonzero()[:, 0]
    size = min(max(window, BLOCK), len(number))
    pad = -len(number) % size
    # What fills up the last block belongs to no piece.
    piece = F.pad(piece, (0, pad), value=-1).view(-1, size)
    number, key, query, alive = (F.pad(x, (0, pad)).view(-1, size) for x in (number, key, query, alive))
    owners, numbers, lives = piece, number, alive
    if len(key) > 1:
        key, owners, numbers, lives = (_with_block_before(x) for x in (key, owners, numbers, lives))
        owners[0, :size] = -2
    distance = number[:, :, None] - numbers[:, None]
    seen = (piece[:, :, None] == owners[:, None]) & (distance >= 0) & (distance < window) & lives[:, None]
    return Layout(query, key, seen, back)


def _with_block_before(blocks: Tensor) -> Tensor:
    """`[M,C]` -> `[M,2C]`; the first one's is itself."""
    return torch.cat([torch.cat([blocks[:1], blocks[:-1]]), blocks], 1)


def _one_token_each(length: Tensor, held: int) -> Layout:
    """Decoding: each piece's token looks at its past rows and itself."""
    token = torch.arange(len(length), device=length.device)
    row = torch.arange(held + 1, device=length.device)
    key = torch.where(row < held, token[:, None] * held + row, len(length) * held + token[:, None])
    return Layout(token[:, None], key, (row >= held - length[:, None])[:, None], token)
