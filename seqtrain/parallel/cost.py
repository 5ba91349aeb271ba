"""What scans cost on a group: a few numbers, measured once with real scans."""

import logging
import math
import statistics
import time

import torch

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.scan_engine import Engine
from seqtrain.parallel.schedules import Costs, Pipeline

log = logging.getLogger("seqtrain.parallel")

REPEATS = 11
VOLLEY = 33
PROBE_BYTES = (1 << 14, 1 << 22)


def costs_of(engine: Engine, device: torch.device) -> Costs:
    """What scans cost on this group, measured when it is first asked for: by every rank at the same point."""
    if engine.costs is None:
        engine.costs = measure(engine, device)
    return engine.costs


def measure(engine: Engine, device: torch.device) -> Costs:
    """Measures the group with real scans of its own: there along the ranks and back, timed by rank 0, in median.

    Every rank must call it at the same point. All use rank 0's figures, so that all choose alike.
    """
    small = _round_trip(engine, 8, 1, device)
    size = PROBE_BYTES[0]
    while True:
        large = _round_trip(engine, size // 4, 1, device)
        # Rank 0 decides for all whether the bytes weigh enough against the latency to be told from it.
        if _from_first(engine, [float(large > 4 * small or size >= PROBE_BYTES[1])], device)[0]:
            break
        size *= 4
    hops = engine.size - 1
    latency, byte = _from_first(engine, [small / hops, max(0.0, large - small) / hops / size], device)
    overhead = _overhead(engine, latency, byte, device)
    costs = Costs(latency, *_from_first(engine, [overhead, byte, _product_seconds(device)], device))
    log.info(
        "all_scan: measured on %d ranks: latency %.3g ms, %.3g ms per message, %.4g MB/s, %.3g G multiply-adds/s",
        engine.size,
        1e3 * costs.latency,
        1e3 * costs.overhead,
        1e-6 / max(costs.byte, 1e-12),
        1e-9 / max(costs.product, 1e-15),
    )
    return costs


def _overhead(engine: Engine, latency: float, byte: float, device: torch.device) -> float:
    """What a further block costs apart from its bytes, from a pipeline of many blocks, as `Pipeline.alone` has it.

    Blocks of a few bytes would not do: they arrive together and wake their receiver once, not once each.
    """
    numbers = int(max(8, min(latency / 8 / max(byte, 1e-12), 1 << 18) // 4))
    on_link = 4 * numbers * byte
    volley = _round_trip(engine, numbers * VOLLEY, VOLLEY, device)
    pace = (volley - (engine.size - 1) * (latency + on_link)) / (VOLLEY - 1)
    return math.sqrt(max(0.0, pace**2 - on_link**2))


def _round_trip(engine: Engine, numbers: int, blocks: int, device: torch.device) -> float:
    """Median seconds of one way, from scans of `numbers` float32 there and back; meaningful on rank 0."""
    shape = AffineShape.of((numbers,), None)
    own = AffineMap(None, torch.zeros(1, 1, numbers, device=device))
    times = []
    for _ in range(REPEATS):
        # Receives for both directions are posted before anything moves, as they are in training.
        jobs = [engine.open(Pipeline(blocks), shape, torch.float32, device, reverse=back) for back in (False, True)]
        # The ranks fall in step on a scan of one number from the last rank to the first: rank 0 then starts the clock.
        _sums(engine, torch.zeros(1, device=device), reverse=True)
        _synchronize(device)
        begin = time.perf_counter()
        for job in jobs:
            engine.start(job, own, None)
            job.result()
        _synchronize(device)
        times.append((time.perf_counter() - begin) / 2)
    return statistics.median(times[1:])


def _from_first(engine: Engine, values: list[float], device: torch.device) -> list[float]:
    """Rank 0's `values`, on every rank: a scan of sums in which only rank 0 adds anything."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    return _sums(engine, mine if engine.rank == 0 else torch.zeros_like(mine)).tolist()


def _sums(engine: Engine, values: torch.Tensor, *, reverse: bool = False) -> torch.Tensor:
    """The sum of all ranks' `values` up to this one."""
    shape = AffineShape.of(values.shape, None)
    job = engine.open(Pipeline(), shape, values.dtype, values.device, reverse=reverse)
    engine.start(job, AffineMap(None, shape.state(values)), None)
    return job.result()[1].flatten()


def _product_seconds(device: torch.device) -> float:
    rows, width = 8, 64
    matrix = torch.ones(rows, width, width, device=device)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.bmm(matrix, matrix)
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / (rows * width**3)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
