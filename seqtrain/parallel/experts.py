"""Experts sharded over the ranks of a group: rows travel to the rank that has their expert, and back."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.parallel.exchange import exchange

# Rows sorted by expert and how many each expert has -> what the experts make of them, row by row.
Work = Callable[[Tensor, Tensor], Tensor]


def dispatch_and_combine(rows: Tensor, counts: Tensor, work: Work, *, group: dist.ProcessGroup) -> Tensor:
    """`work(rows, counts)` where each of P ranks has the next E / P experts and runs `work` with those alone.

    `rows: [n,D]`, sorted by expert; `counts`: int64 `[E]`, how many each has. Returns `[n,D]`, differentiable. Every
    rank of `group` calls, also one without rows. Bytes: a row that a rank's expert works on once there, once back; the
    same backward.
    """
    ranks, width = group.size(), rows.shape[1]
    own = len(counts) // ranks
    sizes = [own] * ranks
    # How many rows come, by sender and expert of this rank.
    come = exchange(counts.contiguous(), sizes, sizes, group=group, agreed=f"experts {own}").view(ranks, own)
    to_numbers = (counts.view(ranks, own).sum(1) * width).tolist()
    come_numbers = (come.sum(1) * width).tolist()
    arrived = exchange(rows.flatten(), to_numbers, come_numbers, group=group, agreed=f"rows {width}").view(-1, width)
    expert = torch.arange(own, device=rows.device).repeat(ranks).repeat_interleave(come.flatten())
    order = expert.argsort(stable=True)
    made = work(arrived[order], come.sum(0))
    back = made[order.argsort()].flatten()
    return exchange(back, come_numbers, to_numbers, group=group, agreed=f"made {width}").view(-1, width)


def local_experts(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of `[E,...]`, an entry an expert, a copy of this rank's part, the next E / P of P ranks."""
    return whole.chunk(group.size())[group.rank()].clone()
