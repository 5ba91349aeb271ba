"""Attention to one block of keys at a time: outputs with their log-sum-exp, which merge into attention to all of them.

With `lse = log sum_s exp(scale * q . k_s)` of every block, blocks a and b together have `lse = log(e^lse_a + e^lse_b)`
and `out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b`. Given the `out` and `lse` of all keys, the weights of a block
are `e^(scores - lse)`, so its gradients need no other block (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.documents import state_dtype

# Queries whose scores are held at once where no fused kernel serves.
QUERIES = 512


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, fused: bool = True) -> tuple[Tensor, Tensor]:
    """`q [B,T,H,K]` attends to `k [B,S,G,K]`, `v [B,S,G,V]`, all three of one dtype and with T, S > 0.

    `causal`: query t sees keys up to t (then T == S), else all. `fused`: use a fused kernel where there is one.
    Returns `out [B,T,H,V]` in q's dtype and `lse [B,H,T]`, float32 (float64 for float64).
    """
    if not (fused and _has_fused(q)):
        return _plain(q, k, v, scale, causal)
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
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients of q, k and v, in their shapes and dtype.

    `out`, `lse`: of attention to all keys, of which these are a block; `d_out`: gradient of that `out`.
    """
    if not (fused and _has_fused(q)):
        return _plain_gradients(d_out, q, k, v, out, lse, scale, causal)
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


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, first: int) -> Tensor:
    """`[B,G,H/G,t,S]` for queries `first ... first + t`, `[B,t,G,H/G,K]`; -inf where a key is not seen."""
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k) * scale
    if causal:
        query = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > query, -torch.inf)
    return scores


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dtype, groups = state_dtype(q.dtype), k.shape[2]
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    outs, sums = [], []
    for first in range(0, q.shape[1], QUERIES):
        queries = _grouped(q[:, first : first + QUERIES].to(dtype), groups)
        scores = _scores(queries, wide_k, scale, causal, first)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_()
        outs.append(torch.einsum("bgrts,bsgv->btgrv", weights, wide_v).flatten(2, 3).to(q.dtype))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, 1), torch.cat(sums, 2)


def _plain_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = state_dtype(q.dtype), k.shape[2]
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    dk, dv, dqs = torch.zeros_like(wide_k), torch.zeros_like(wide_v), []
    for first in range(0, q.shape[1], QUERIES):
        some = slice(first, first + QUERIES)
        queries, d_rows, rows = (_grouped(part[:, some].to(dtype), groups) for part in (q, d_out, out))
        sums = lse[:, :, some].unflatten(1, (groups, -1))[..., None].to(dtype)
        weights = _scores(queries, wide_k, scale, causal, first).sub_(sums).exp_()
        dv += torch.einsum("bgrts,btgrv->bsgv", weights, d_rows)
        delta = (d_rows * rows).sum(-1).permute(0, 2, 3, 1)[..., None]  # B G H/G t 1
        d_scores = weights.mul_(torch.einsum("btgrv,bsgv->bgrts", d_rows, wide_v).sub_(delta)).mul_(scale)
        dqs.append(torch.einsum("bgrts,bsgk->btgrk", d_scores, wide_k).flatten(2, 3).to(q.dtype))
        dk += torch.einsum("bgrts,btgrk->bsgk", d_scores, queries)
    return torch.cat(dqs, 1), dk.to(k.dtype), dv.to(v.dtype)
