"""The ranks of a run as a grid: data parallel, sequence (context) parallel and tensor parallel along its axes."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from seqtrain.parallel.cost import costs_of
from seqtrain.parallel.scan import Algorithm, flush_scans
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.schedules import candidates
from seqtrain.parallel.tensor import ALONE, TensorParallel


@dataclass(frozen=True)
class Shards:
    """ZeRO divides over the ranks of `group`, neighbors; those of `replicas` hold the same parts."""

    group: dist.ProcessGroup
    replicas: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's place among `data_ranks x sequence_ranks x tensor.count`.

    Tensor-parallel ranks are neighbors, then those that share a sequence, and so are on one machine wherever a machine
    has room for them. `group`: those that hold this rank's sequence, in order of time; None where a sequence is held
    whole. `experts`: those next to each other over which experts are sharded, whatever tokens they hold; None where
    each rank has all. `replicas`: those that hold the same parts of layers; None: all ranks. The ranks of each have the
    same place in `tensor`. `shards`: None where ZeRO divides over all of those.
    """

    data_rank: int
    data_ranks: int
    sequence_rank: int
    sequence_ranks: int
    group: dist.ProcessGroup | None
    # Schedule of the scans.
    algorithm: Algorithm
    experts: dist.ProcessGroup | None = None
    tensor: TensorParallel = ALONE
    replicas: dist.ProcessGroup | None = None
    shards: Shards | None = None


@contextmanager
def form_mesh(
    world: dist.ProcessGroup,
    *,
    sequence: int,
    experts: int = 1,
    tensor: int = 1,
    shard: int = 0,
    algorithm: Algorithm,
    device: torch.device,
    timeout_seconds: int,
    in_line: bool = False,
) -> Iterator[Mesh]:
    """The ranks of `world` as a mesh of sequences over `sequence` ranks each, as long as the context is open.

    `experts`: ranks over which experts are sharded. `tensor`: over which layers are divided. `shard`: over which ZeRO
    divides, without `tensor`; 0: all. `in_line`: no scan runs beside the layers, see `Engine.in_line`.

    All ranks of `world` call it and leave it together, since groups are formed and scans are measured. Where it is
    left with an error the groups are left too: another rank may be gone, and nothing that waits for it would return.
    """
    rank, ranks = world.rank(), world.size()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    group, owners = (_neighbors(rank, ranks, size, tensor, timeout) for size in (sequence, experts))
    divided = _neighbors(rank, ranks, tensor, 1, timeout)
    replicas = None if divided is None else _neighbors(rank, ranks, ranks // tensor, tensor, timeout, alone=True)
    shards = None
    if 0 < shard < ranks // tensor:
        own = _neighbors(rank, ranks, shard, 1, timeout, alone=True)
        alike = _neighbors(rank, ranks, ranks // shard, shard, timeout, alone=True)
        assert own is not None
        assert alike is not None
        shards = Shards(own, alike)
    groups = [each for each in (group, owners, divided, replicas) if each is not None]
    groups += [shards.group, shards.replicas] if shards else []
    place = rank // tensor
    # Now, when all ranks are here with nothing else to do: NCCL forms a communicator at its first operation, in which
    # all its ranks must take part, and in the first layer others would compute while costs are measured.
    for formed in groups:
        engine_of(formed.group_name).in_line |= in_line
        dist.all_reduce(torch.zeros(1, device=device), group=formed)
    if group is not None and len(candidates(algorithm)) > 1:
        costs_of(engine_of(group.group_name), device)
    yield Mesh(
        place // sequence,
        ranks // tensor // sequence,
        place % sequence,
        sequence,
        group,
        algorithm,
        owners,
        TensorParallel(rank % tensor, tensor, divided),
        replicas,
        shards,
    )
    for formed in groups:
        flush_scans(formed)
        # A neighbor may still be reading what this rank has sent.
        dist.barrier(world)
        engine_of(formed.group_name).stop()
        dist.destroy_process_group(formed)


def _neighbors(
    rank: int, ranks: int, size: int, step: int, timeout: datetime.timedelta, *, alone: bool = False
) -> dist.ProcessGroup | None:
    """The group that `rank` is in of so many ranks, each `step` after the one before. Every rank calls.

    None for one, unless `alone`.
    """
    assert ranks % (size * step) == 0, (ranks, size, step)
    if size == 1 and not alone:
        return None
    # Every rank takes part in forming every group.
    own = None
    for block in range(0, ranks, size * step):
        for first in range(block, block + step):
            members = list(range(first, first + size * step, step))
            formed = dist.new_group(members, timeout=timeout)
            own = formed if rank in members else own
    return own
