"""Attention of the part of a document that a rank starts with to all before it in that document, block by block.

Ranks pass their keys and values on in rounds: in round d rank r serves rank r + d and is served by r - d. A block is
used and forgotten, and fetched again in backward, where its gradients go back to the rank that owns it. So a rank holds
two blocks next to its own, whatever the number of ranks. As PyTorch operators: they compile, differentiate, and
activation checkpointing saves the output, not the blocks.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.softmax_attention.blocks import attend, attend_gradients, merge
from seqtrain.parallel.halo import HaloPlan, RowRange
from seqtrain.parallel.scan import COMMUNICATE
from seqtrain.parallel.scan_engine import Wire, engine_of


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cap: float = 0.0,
    fused: bool,
    plan: HaloPlan,
    group: dist.ProcessGroup,
) -> Tensor:
    """Causal attention `[B,F,H,V]` of the first F tokens of this rank to theirs and to the rows this rank wants.

    Args:
        q: `[B,F,H,K]`, queries of the rank's part of its first document; none where it wants no rows.
        k, v: `[B,T_r,G,K]` and `[B,T_r,G,V]`, all of the rank's, of q's dtype; on the group's first rank after the
            plan's given rows.
        scale, cap: the operator's `scale` and `score_cap`.
        fused: use a fused kernel where there is one.
        plan: every rank wants its first document's rows, or none.
        group: every rank of it calls; the loss of every rank must depend on the result, of no rows too.

    Bytes: the wanted keys and values are received once forward and once backward, and their gradients sent back.
    """
    numbers = (plan.given, *plan.starts, *plan.offsets)
    return torch.ops.seqtrain.block_attention(q, k, v, scale, cap, fused, numbers, group.group_name)[0]


@dataclass
class _Rounds:
    """The rounds of one pass; `kv [B,T_r,G,K+V]`: what this rank can serve."""

    wire: Wire
    plan: HaloPlan
    rank: int
    kv: Tensor

    def run(self, use: Callable[[Tensor], Tensor | None], d_kv: Tensor | None = None) -> None:
        """`use(block)` for every block from elsewhere, the nearest first.

        With `d_kv`, like `kv`, it returns the block's gradient, and what others find for this rank's is added to it.
        """
        # One wait a round, for the same messages on both sides of each: NCCL would wait for ever for a send whose
        # receive comes a round later. On gloo the next block is on its way while this one is used.
        came, posted = self._offer(1)
        self.wire.receive_exchange(posted)
        for distance in range(1, _reach(self.plan) + 1):
            block = came
            came, posted = self._offer(distance + 1)
            gradient = None if block is None else use(block)
            served = None
            if d_kv is not None:
                if gradient is not None:
                    self.wire.send(gradient.contiguous(), self.rank - distance)
                served = self._served(distance)
            if served is not None:
                back = self.kv.new_empty(*self.kv.shape[:1], served.count, *self.kv.shape[2:])
                self.wire.post(back, served.rank)
                posted += 1
            self.wire.receive_exchange(posted)
            if served is not None and d_kv is not None:
                d_kv[:, served.first : served.last] += back

    def _offer(self, distance: int) -> tuple[Tensor | None, int]:
        """Sends and receives what travels over `distance` ranks: the coming block, and the number of messages."""
        served = self._served(distance)
        if served is not None:
            self.wire.send(self.kv[:, served.first : served.last].contiguous(), served.rank)
        source = self.rank - distance
        wanted = self.plan.wanted(self.rank, source) if source >= 0 else None
        if wanted is None:
            return None, 0
        block = self.kv.new_empty(self.kv.shape[0], wanted.count, *self.kv.shape[2:])
        self.wire.post(block, source)
        return block, 1

    def _served(self, distance: int) -> RowRange | None:
        """What this rank sends over `distance`, with the rank that gets it."""
        to = self.rank + distance
        rows = self.plan.wanted(to, self.rank) if to < len(self.plan.starts) else None
        return None if rows is None else replace(rows, rank=to)


@lru_cache(maxsize=64)
def _reach(plan: HaloPlan) -> int:
    """How many ranks to the left the farthest rows come from."""
    # Positions before 0 are on the first rank.
    holders = (bisect_right(plan.offsets, start) - 1 if start >= 0 else 0 for start in plan.starts)
    return max(rank - holder if plan.before(rank) else 0 for rank, holder in enumerate(holders))


def _plan(numbers: Sequence[int]) -> HaloPlan:
    """The plan whose given rows, starts and offsets an operator was handed."""
    ranks = len(numbers) // 2 - 1
    return HaloPlan(tuple(numbers[1 : 1 + ranks]), tuple(numbers[1 + ranks :]), numbers[0])


def _agreed(what: str, plan: HaloPlan, k: Tensor, v: Tensor) -> str:
    return f"{what} {plan.text} {tuple(k.shape[2:])} {tuple(v.shape[2:])} {k.dtype}"


@torch.library.custom_op("seqtrain::block_attention", mutates_args=())
def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, fused: bool, numbers: Sequence[int], group_name: str
) -> tuple[Tensor, Tensor]:
    """`out` and its log-sum-exp."""
    plan, engine = _plan(numbers), engine_of(group_name)
    mine = plan.given if engine.rank == 0 else 0
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=state_dtype(q.dtype))
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)

    def use(block: Tensor) -> None:
        nonlocal out, lse
        keys, values = block.split([k.shape[3], v.shape[3]], -1)
        out, lse = merge(out, lse, *attend(q, keys, values, scale=scale, causal=False, cap=cap, fused=fused))

    kv = torch.cat([k, v], -1)
    with engine.messages(_agreed("block_attention", plan, k, v), q.device) as wire:
        if q.shape[1]:
            own = slice(mine, mine + q.shape[1])
            narrow, lse = attend(q, k[:, own], v[:, own], scale=scale, causal=True, cap=cap, fused=fused)
            out = narrow.to(out.dtype)
            if mine:
                use(kv[:, :mine])
        _Rounds(wire, plan, engine.rank, kv).run(use)
    return out.to(q.dtype).contiguous(), lse.contiguous()


@torch.library.custom_op("seqtrain::block_attention_backward", mutates_args=())
def _block_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cap: float,
    fused: bool,
    numbers: Sequence[int],
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    plan, engine = _plan(numbers), engine_of(group_name)
    mine, widths = plan.given if engine.rank == 0 else 0, [k.shape[3], v.shape[3]]
    kv = torch.cat([k, v], -1)
    dq = torch.zeros_like(q, dtype=state_dtype(q.dtype), memory_format=torch.contiguous_format)
    d_kv = torch.zeros_like(kv, dtype=dq.dtype)

    def use(block: Tensor, causal: bool) -> Tensor:
        keys, values = block.split(widths, -1)
        mine, d_keys, d_values = attend_gradients(
            d_out, q, keys, values, out, lse, scale=scale, causal=causal, cap=cap, fused=fused
        )
        dq.add_(mine)
        return torch.cat([d_keys, d_values], -1)

    with engine.messages(_agreed("block_attention backward", plan, k, v), q.device) as wire:
        if q.shape[1]:
            own = slice(mine, mine + q.shape[1])
            d_kv[:, own] += use(kv[:, own], True)
            if mine:
                d_kv[:, :mine] += use(kv[:, :mine], False)
        _Rounds(wire, plan, engine.rank, kv).run(lambda block: use(block, False), d_kv)
    # Results of an operator must not share memory: copies, also where a part is contiguous as it is.
    dk, dv = (part.to(k.dtype).clone(memory_format=torch.contiguous_format) for part in d_kv.split(widths, -1))
    return dq.to(q.dtype), dk, dv


@_block_attention.register_fake
def _(q, k, v, scale, cap, fused, numbers, group_name):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, out.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=state_dtype(q.dtype))


@_block_attention_backward.register_fake
def _(d_out, q, k, v, out, lse, scale, cap, fused, numbers, group_name):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.seqtrain.block_attention_backward(d_out, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * len(ctx.settings)


_block_attention.register_autograd(_gradients, setup_context=_remember)

COMMUNICATE.add(torch.ops.seqtrain.block_attention.default)
