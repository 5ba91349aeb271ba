"""The ranks of a run as a grid: data parallel along one axis, sequence (context) parallel along the other."""

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


@dataclass(frozen=True)
class Mesh:
    """This rank's place among `data_ranks x sequence_ranks`.

    Sequence-parallel ranks are neighbors, and so are on one machine wherever a machine has room for them.
    `group`: those that hold this rank's sequence, in order of time; None where a sequence is held whole. `experts`:
    neighbors over which experts are sharded, whatever tokens they hold; None where each rank has all.
    """

    data_rank: int
    data_ranks: int
    sequence_rank: int
    sequence_ranks: int
    group: dist.ProcessGroup | None
    # Schedule of the scans.
    algorithm: Algorithm
    experts: dist.ProcessGroup | None = None


@contextmanager
def form_mesh(
    world: dist.ProcessGroup,
    *,
    sequence: int,
    experts: int = 1,
    algorithm: Algorithm,
    device: torch.device,
    timeout_seconds: int,
) -> Iterator[Mesh]:
    """The ranks of `world` as a mesh of sequences over `sequence` ranks each, as long as the context is open.

    `experts`: ranks over which experts are sharded.

    All ranks of `world` call it and leave it together, since groups are formed and scans are measured. Where it is
    left with an error the groups are left too: another rank may be gone, and nothing that waits for it would return.
    """
    rank, ranks = world.rank(), world.size()
    group, owners = (_neighbors(rank, ranks, size, timeout_seconds) for size in (sequence, experts))
    if group is not None and len(candidates(algorithm)) > 1:
        # Now, when all ranks are here with nothing else to do; in the first layer others would compute meanwhile.
        costs_of(engine_of(group.group_name), device)
    yield Mesh(rank // sequence, ranks // sequence, rank % sequence, sequence, group, algorithm, owners)
    for formed in filter(None, (group, owners)):
        flush_scans(formed)
        # A neighbor may still be reading what this rank has sent.
        dist.barrier(world)
        dist.destroy_process_group(formed)


def _neighbors(rank: int, ranks: int, size: int, timeout_seconds: int) -> dist.ProcessGroup | None:
    """The group of so many neighbors that `rank` is one of; None for one. Every rank calls."""
    assert ranks % size == 0, (ranks, size)
    if size == 1:
        return None
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # Every rank takes part in forming every group.
    formed = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in range(0, ranks, size)]
    return formed[rank // size]
