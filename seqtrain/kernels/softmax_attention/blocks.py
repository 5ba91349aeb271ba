"""Attention to one block of keys at a time: outputs with their log-sum-exp, which merge into attention to all of them.

With `lse = log sum_s exp(scale * q . k_s)` of every block, blocks a and b together have `lse = log(e^lse_a + e^lse_b)`
and `out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b`. Given the `out` and `lse` of all keys, the weights of a block
are `e^(scores - lse)`, so its gradients need no other block (Dao et al. 2022, arXiv 2205.14135, algorithm 4).

PyTorch's fused kernels can't cap scores: what is capped is done by plain PyTorch, a block of queries at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.linear_cross_entropy import soft_cap

# Queries whose scores are held at once where no fused kernel serves.
QUERIES = 512
# Documents from this length on are attended to one by one: a call's own cost (about 0.1 ms) is lost in their work.
ALONE = 1024


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, cap: float = 0.0, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """`q [B,T,H,K]` attends to `k [B,S,G,K]`, `v [B,S,G,V]`, all three of one dtype and with T, S > 0.

    `causal`: query t sees keys up to t (then T == S), else all. `cap`: the operator's `score_cap`. `fused`: use a fused
    kernel where there is one. Returns `out [B,T,H,V]` in q's dtype and `lse [B,H,T]`, float32 (float64 for float64).
    """
    if cap or not (fused and _has_fused(q)):
        return _plain(q, k, v, _Scores(scale, cap, causal))
    width = v.shape[3]
    q, k, v = (rows.transpose(1, 2) for rows in same_width(q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        k, v = (rows.repeat_interleave(q.shape[1] // k.shape[1], 1) for rows in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2)[..., :width], lse


def attend_gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    cap: float = 0.0,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients of q, k and v, in their shapes and dtype.

    `out`, `lse`: of attention to all keys, of which these are a block; `d_out`: gradient of that `out`.
    """
    if cap or not (fused and _has_fused(q)):
        return _plain_gradients(d_out, q, k, v, out, lse, _Scores(scale, cap, causal))
    widths = q.shape[3], k.shape[3], v.shape[3]
    rows = (part.transpose(1, 2) for part in same_width(d_out, q, k, v, out))
    d_out, q, k, v, out = rows
    if q.device.type == "cpu":
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    else:
        gradients = _cuda_gradients(d_out, q, k, v, out, lse, scale, causal)
    dq, dk, dv = (rows.transpose(1, 2)[..., :width] for rows, width in zip(gradients, widths, strict=True))
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both: `out`, `block` are `[B,T,H,V]`, `lse`, `block_lse` `[B,H,T]`; in out's dtype."""
    total = torch.logaddexp(lse, block_lse)
    mine, others = ((part - total).exp().transpose(1, 2)[..., None] for part in (lse, block_lse))  # B T H 1
    return out * mine + block * others, total


class Packed:
    """Documents of one row, nothing before them: long ones one by one, short ones side by side in batches of similar
    length, where causality hides the padding.

    `alone`: places of the long ones, from `long` tokens on.
    """

    def __init__(self, boundaries: Sequence[int], long: int = ALONE):
        """`boundaries`: from 0 to the row's length; documents may be empty."""
        self.tokens = boundaries[-1]
        self.alone: list[slice] = []
        self._batches: list[tuple[Tensor, Tensor]] = []
        short: dict[int, list[tuple[int, int]]] = {}
        for start, end in pairwise(boundaries):
            if end - start >= long or end - start == self.tokens > 0:
                self.alone.append(slice(start, end))
            elif end > start:
                # Lengths within a factor of two side by side: at most ten calls, whatever the number of documents.
                short.setdefault((end - start).bit_length(), []).append((start, end - start))
        for documents in short.values():
            starts, lengths = torch.tensor(documents).unbind(1)
            step = torch.arange(int(lengths.max()))
            # Filled up with its own last token: hidden values count for zero, and zero times infinity is NaN.
            places = starts[:, None] + torch.minimum(step, lengths[:, None] - 1)
            self._batches.append((places, step < lengths[:, None]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """As the function, causally within documents; B rows where there is one document."""
        if self.alone and self.alone[0] == slice(0, self.tokens):
            return attend(q, k, v, causal=True, **options)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=state_dtype(q.dtype), device=q.device)
        for rows in self.alone:
            out[:, rows], lse[:, :, rows] = attend(q[:, rows], k[:, rows], v[:, rows], causal=True, **options)
        for places, real in self.batches(q.device):
            found, sums = attend(q[0][places], k[0][places], v[0][places], causal=True, **options)
            out[0, places[real]] = found[real]
            lse[0, :, places[real]] = sums.transpose(1, 2)[real].T
        return out, lse

    def gradients(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q, k and v, as `attend_gradients`."""
        if self.alone and self.alone[0] == slice(0, self.tokens):
            return attend_gradients(d_out, q, k, v, out, lse, causal=True, **options)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        for rows in self.alone:
            part = [x[:, rows] for x in (d_out, q, k, v, out)] + [lse[:, :, rows]]
            dq[:, rows], dk[:, rows], dv[:, rows] = attend_gradients(*part, causal=True, **options)
        for places, real in self.batches(q.device):
            part = [x[0][places] for x in (d_out, q, k, v, out)] + [lse[0].T[places].transpose(1, 2).contiguous()]
            part[0].mul_(real[..., None, None])
            found = attend_gradients(*part, causal=True, **options)
            for x, gradient in zip((dq, dk, dv), found, strict=True):
                x[0, places[real]] = gradient[real]
        return dq, dk, dv

    def batches(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """int64 `[documents, longest]` places of short ones' tokens, filled up with their last, and which are real."""
        if self._batches and self._batches[0][0].device != device:
            self._batches = [(places.to(device), real.to(device)) for places, real in self._batches]
        return self._batches


# The same in all layers of a step.
packed = lru_cache(maxsize=16)(Packed)


def _has_fused(q: Tensor) -> bool:
    if q.device.type == "cuda":
        return q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cpu"


def same_width(*parts: Tensor) -> list[Tensor]:
    """The fused kernels want K == V; zeros change neither scores nor values."""
    widest = max(rows.shape[3] for rows in parts)
    return [rows if rows.shape[3] == widest else F.pad(rows, (0, widest - rows.shape[3])) for rows in parts]


def _cuda_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    share = q.shape[1] // k.shape[1]
    k, v = (rows.repeat_interleave(share, 1) for rows in (k, v))
    # Without dropout the state of the random generator is not read.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed[:0], scale=scale
    )
    return dq, dk.unflatten(1, (-1, share)).sum(2), dv.unflatten(1, (-1, share)).sum(2)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    return rows.unflatten(2, (groups, -1))  # B T G H/G K


@dataclass(frozen=True)
class _Scores:
    """What is exponentiated: see `attend`. `mask`: True where a key is seen, `[T,S]` or `[B,1,T,S]`."""

    scale: float
    cap: float
    causal: bool
    mask: Tensor | None = None

    def of(self, q: Tensor, k: Tensor, first: int) -> Tensor:
        """`[B,G,H/G,t,S]` for queries `first ... first + t`, `[B,t,G,H/G,K]`; -inf where a key is not seen."""
        scores = soft_cap(torch.einsum("btgrk,bsgk->bgrts", q, k) * self.scale, self.cap)
        if self.causal:
            query = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
            scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > query, -torch.inf)
        if self.mask is not None:
            seen = self.mask[..., first : first + q.shape[1], :]
            scores.masked_fill_(~(seen if seen.dim() == 2 else seen[:, None]), -torch.inf)
        return scores

    def backward(self, scores: Tensor, d_scores: Tensor) -> Tensor:
        """The gradient of the products of queries and keys, given that of `scores`; both are overwritten."""
        if self.cap:
            # What is not seen is as if at the cap, where the slope is zero.
            d_scores = d_scores.mul_(1 - scores.clamp_(min=-self.cap).div_(self.cap).square_())
        return d_scores.mul_(self.scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, score: _Scores) -> tuple[Tensor, Tensor]:
    dtype, groups = state_dtype(q.dtype), k.shape[2]
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    outs, sums = [], []
    for first in range(0, q.shape[1], QUERIES):
        queries = _grouped(q[:, first : first + QUERIES].to(dtype), groups)
        seen = slice(first + queries.shape[1] if score.causal else None)
        scores = score.of(queries, wide_k[:, seen], first)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_()
        outs.append(torch.einsum("bgrts,bsgv->btgrv", weights, wide_v[:, seen]).flatten(2, 3).to(q.dtype))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, 1), torch.cat(sums, 2)


def _plain_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, score: _Scores
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = state_dtype(q.dtype), k.shape[2]
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    dk, dv, dqs = torch.zeros_like(wide_k), torch.zeros_like(wide_v), []
    for first in range(0, q.shape[1], QUERIES):
        some = slice(first, first + QUERIES)
        queries, d_rows, rows = (_grouped(part[:, some].to(dtype), groups) for part in (q, d_out, out))
        seen = slice(first + queries.shape[1] if score.causal else None)
        sums = lse[:, :, some].unflatten(1, (groups, -1))[..., None].to(dtype)
        scores = score.of(queries, wide_k[:, seen], first)
        weights = (scores.clone() if score.cap else scores).sub_(sums).exp_()
        dv[:, seen] += torch.einsum("bgrts,btgrv->bsgv", weights, d_rows)
        delta = (d_rows * rows).sum(-1).permute(0, 2, 3, 1)[..., None]  # B G H/G t 1
        d_weights = torch.einsum("btgrv,bsgv->bgrts", d_rows, wide_v[:, seen])
        d_scores = score.backward(scores, weights.mul_(d_weights.sub_(delta)))
        dqs.append(torch.einsum("bgrts,bsgk->btgrk", d_scores, wide_k[:, seen]).flatten(2, 3).to(q.dtype))
        dk[:, seen] += torch.einsum("bgrts,btgrk->bsgk", d_scores, queries)
    return torch.cat(dqs, 1), dk.to(k.dtype), dv.to(v.dtype)


def _few_rows(q: Tensor, mask: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Rows whose scores are held at once: of many short ones as many as have `QUERIES` queries. With their masks."""
    count = max(1, QUERIES // q.shape[1])
    parts = [slice(first, first + count) for first in range(0, q.shape[0], count)]
    return [(rows, mask[rows] if mask is not None and mask.dim() == 4 else mask) for rows in parts]


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        parts = [_plain(q[r], k[r], v[r], _Scores(scale, cap, causal, own)) for r, own in _few_rows(q, mask)]
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(sums)


def _capped_gradients(arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Any:
    q, k, v, mask, causal, scale, cap = arguments
    (d_out,), (out, lse) = gradients, kept
    parts = [
        _plain_gradients(d_out[r], q[r], k[r], v[r], out[r], lse[r], _Scores(scale, cap, causal, own))
        for r, own in _few_rows(q, mask)
    ]
    return *map(torch.cat, zip(*parts, strict=True)), *[None] * 4


def _capped_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = v.new_empty(*q.shape[:3], v.shape[3])
    return out, out.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=state_dtype(q.dtype))


# `(q, k, v, mask, causal, scale, cap)`, as `attend` and `_Scores` say, to `(out,)`.
attend_capped = differentiable(
    "capped_attention", _capped, _capped_gradients, _capped_shapes, results=1, keep_results=True
)
