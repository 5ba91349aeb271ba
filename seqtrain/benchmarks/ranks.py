"""What tools that measure over ranks share: how ranks are started, a common start, bytes on the wire."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.parallel import flush_scans
from seqtrain.parallel.testing import run_ranks

WARM_UP = 2


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, limit: float = 3600.0) -> Any:
    """`function(group, *arguments)` on every rank; returns rank 0's result, None on the others.

    Where a launcher has set RANK, its ranks are used, and `ranks` must be 0 or their number; otherwise `ranks`
    processes are forked here, on the loopback interface. `limit`: seconds for all of it.
    """
    torch.set_num_threads(1)

    def work(_: int) -> Any:
        group = dist.group.WORLD
        assert group is not None, "the process group was just made"
        result = function(group, *arguments)
        flush_scans(group)
        dist.barrier(group=group)
        return result if group.rank() == 0 else None

    if "RANK" not in os.environ:
        return run_ranks(ranks, work, limit=limit, group_timeout=limit)[0]
    dist.init_process_group("gloo")
    try:
        return work(0)
    finally:
        dist.destroy_process_group()


def on_first_ranks(group: dist.ProcessGroup, counts: Sequence[int], function: Callable[..., list]) -> list:
    """`function(group of the first P ranks)` for every P of `counts`, the others waiting; all results in one list."""
    rows = []
    for count in counts:
        part = group if count == group.size() else dist.new_group(list(range(count)))
        if group.rank() < count:
            assert isinstance(part, dist.ProcessGroup), f"rank {group.rank()} is one of the first {count}"
            rows += function(part)
            flush_scans(part)
        dist.barrier(group=group)
    return rows


def makespan(group: dist.ProcessGroup, timed: Callable[[], object], *, shared_clock: bool) -> float:
    """Seconds from a start all ranks agree on to the end of the last rank, on every rank."""
    start = torch.tensor([time.monotonic() + 0.05], dtype=torch.float64)
    dist.broadcast(start, group=group, group_src=0)
    if shared_clock:
        # Everyone begins at one instant of the machine's clock, and not whenever a barrier lets it go.
        time.sleep(max(0.0, start.item() - time.monotonic()))
        begin = start.item()
    else:
        dist.barrier(group=group)
        begin = time.monotonic()
    timed()
    taken = torch.tensor([time.monotonic() - begin], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
    return taken.item()


def measure_in_turn(
    group: dist.ProcessGroup, runs: Mapping[str, Callable[[], Callable[[], object]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every run, `rounds` of each in turn; `runs[name]()` prepares, what it returns is timed."""
    # Ranks under one kernel share its monotonic clock.
    boots: list[str | None] = [None] * group.size()
    dist.all_gather_object(boots, Path("/proc/sys/kernel/random/boot_id").read_text(), group=group)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)  # the same on every rank
    for _ in range(WARM_UP + rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(makespan(group, runs[name](), shared_clock=len(set(boots)) == 1))
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def wire_bytes(group: dist.ProcessGroup, run: Callable[[], object]) -> tuple[float, float] | None:
    """Bytes the busiest rank receives and sends during `run`, by the counters of the interface GLOO_SOCKET_IFNAME
    names; None where it names none, or one that all ranks share.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    folder = Path("/sys/class/net") / name / "statistics"
    if name == "lo" or not folder.is_dir():
        return None

    def counters() -> Tensor:
        time.sleep(0.5)  # nothing else may be under way
        names = ("rx_bytes", "tx_bytes")
        return torch.tensor([int((folder / name).read_text()) for name in names], dtype=torch.float64)

    dist.barrier(group=group)
    before = counters()
    run()
    flush_scans(group)
    used = counters() - before
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    received, sent = used.tolist()
    return received, sent
