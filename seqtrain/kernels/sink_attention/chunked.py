"""PyTorch: blocks of about a window's length see themselves and the block before, and their document's sinks.

A block belongs to one piece, a row or document: what a query does not see counts for zero, and zero times what a
document without numbers left would be NaN. Short documents lie side by side, with others about as long.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.sink_attention import Known

# Queries in a block at least: below it, the cost of a block outweighs its work.
BLOCK = 16


@dataclass(frozen=True)
class Layout:
    """M blocks of Q queries with the S keys each block looks at.

    `owner`: int64 `[M]`, the blocks' pieces. `query`: int64 `[M,Q]`, numbers of flat tokens. `new`: bool `[M,Q]`, which
    are tokens of their own and no filling. `key`: int64 `[M,S]`, numbers among the past rows of all pieces followed by
    the flat tokens. `seen`: bool `[M,Q,S]`.
    """

    owner: Tensor
    query: Tensor
    new: Tensor
    key: Tensor
    seen: Tensor


def run(inputs: Inputs, window: int, scale: float, known: Known) -> Tensor:
    """Flat inputs, `q: [total,H,K]`; see `sink_attention`. Returns `out` alone, `[total,H,V]`."""
    q, k, v, extra_score, extra_value = inputs
    (total, heads), groups = q.shape[:2], k.shape[1]
    if total == 0:
        return q.new_empty(0, heads, v.shape[2])
    dtype, (piece, offset) = state_dtype(q.dtype), known.rows.places(total)
    place = offset + known.past["length"][piece]
    sinks = torch.arange(known.after["sink_k"].shape[1], device=q.device)
    past = [] if known.fresh else [(known.past["k"], known.past["v"])]
    pairs = [*(tuple(x.flatten(0, 1) for x in pair) for pair in past), (k, v)]
    pairs.append((known.after["sink_k"].flatten(0, 1), known.after["sink_v"].flatten(0, 1)))
    k, v = (torch.cat(parts).to(dtype) for parts in zip(*pairs, strict=True))
    first_sink = k.shape[0] - len(known.past["length"]) * len(sinks)
    outs, back, done = [], torch.empty_like(place), 0
    with full_precision(q.device):
        queries = (q.to(dtype) * scale).unflatten(1, (groups, -1))  # total G R K
        for layout in _layouts(known, window, total):
            # A sink inside the window is among the keys already.
            far = place[layout.query][..., None] >= window + sinks
            key = torch.cat([layout.key, first_sink + layout.owner[:, None] * len(sinks) + sinks], 1)
            hidden = ~torch.cat([layout.seen, far], 2)[:, None, None]
            scores = torch.einsum("mqgrk,msgk->mgrqs", queries[layout.query], k[key])
            # Not -inf: the queries that fill up a block see nothing, and must not make gradients NaN.
            scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
            if extra_score is not None:
                extra = extra_score.to(dtype).unflatten(1, (groups, -1))[layout.query]  # M Q G R
                scores = torch.cat([scores, extra.permute(0, 2, 3, 1)[..., None]], -1)
            weights = scores.softmax(-1)
            mine = weights if extra_value is None else weights[..., :-1]
            out = torch.einsum("mgrqs,msgv->mqgrv", mine, v[key])
            if extra_value is not None:
                value = extra_value.to(dtype).unflatten(1, (groups, -1))[layout.query]  # M Q G R V
                out = out + weights[..., -1].permute(0, 3, 1, 2)[..., None] * value
            outs.append(out.flatten(0, 1).flatten(1, 2))
            number = layout.new.flatten().nonzero()[:, 0]
            back[layout.query.flatten()[number]] = done + number
            done += layout.new.numel()
    return (torch.cat(outs) if len(outs) > 1 else outs[0])[back]


def _layouts(known: Known, window: int, total: int) -> list[Layout]:
    rows, held = known.rows, 0 if known.fresh else window - 1
    if total == len(rows.start) and bool((rows.length == 1).all()):
        return [_one_token_each(known.past["length"], held)]
    size, alike = max(window, BLOCK), dict[int, list[int]]()
    for piece, length in enumerate((rows.length + held).tolist()):
        if length > held:
            # Those of half a block at most by length, within a factor of two.
            kind = max(length, BLOCK).bit_length() if 2 * length <= size else -1
            alike.setdefault(kind, []).append(piece)
    device = rows.start.device
    return [_layout(known, torch.tensor(pieces, device=device), window, held, size) for pieces in alike.values()]


def _layout(known: Known, pieces: Tensor, window: int, held: int, size: int) -> Layout:
    """Of `pieces`, int64, all of one block of at most `size` or all of blocks of `size`."""
    rows = known.rows
    lengths = rows.length[pieces] + held
    size = min(size, int(lengths.max()))
    counts = (lengths + size - 1) // size
    owner = pieces.repeat_interleave(counts)
    index = torch.arange(len(owner), device=owner.device)
    block = index - (counts.cumsum(0) - counts).repeat_interleave(counts)
    length = rows.length[owner][:, None]
    # A token's distance from its piece's first new one: negative in the past. Blocks are filled up with the last one.
    number = block[:, None] * size + torch.arange(size, device=owner.device) - held  # M Q
    real, number = number < length, torch.minimum(number, length - 1)
    start, past = rows.start[owner][:, None], owner[:, None]
    key = torch.where(number < 0, (past + 1) * held + number, held * len(rows.start) + start + number)
    alive = real & (number >= -known.past["length"][owner][:, None])
    query, new, numbers = start + number.clamp(min=0), real & (number >= 0), number
    if len(owner) > len(pieces):
        before = index - (block > 0).to(index.dtype)
        lives = torch.cat([alive[before] & (block > 0)[:, None], alive], 1)
        key, numbers = torch.cat([key[before], key], 1), torch.cat([number[before], number], 1)
    else:
        lives = alive
    distance = number[:, :, None] - numbers[:, None]
    return Layout(owner, query, new, key, (distance >= 0) & (distance < window) & lives[:, None])


def _one_token_each(length: Tensor, held: int) -> Layout:
    """Decoding: each piece's token looks at its past rows and itself."""
    token = torch.arange(len(length), device=length.device)
    row = torch.arange(held + 1, device=length.device)
    key = torch.where(row < held, token[:, None] * held + row, len(length) * held + token[:, None])
    query = token[:, None]
    return Layout(token, query, torch.ones_like(query, dtype=torch.bool), key, (row >= held - length[:, None])[:, None])
