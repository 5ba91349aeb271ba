"""Tensor attention over long rows: a training step takes time linear in the tokens."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from experiments.fidelity.training import small_model
from seqtrain.data.synthetic import examples, make_task

LENGTHS = (2048, 4096, 8192, 16384)
# Steps timed at every length: the fastest counts, for a busy machine only ever adds to the time.
REPEATS = 3


def measure(effort: Effort) -> Iterator[Figure]:
    """The slope of log time over log tokens, forward and backward pass of one row; the exact form for comparison."""
    lengths = [length for length in LENGTHS if length <= max(256, LENGTHS[-1] * effort.scale)]
    lengths = lengths if len(lengths) > 1 else [128, 256]
    runs = [_step_seconds(seed, lengths, effort.of(REPEATS)) for seed in effort.seeds]
    yield Figure(
        what=f"slope of log seconds over log tokens, {lengths[0]} to {lengths[-1]} tokens",
        values=tuple(slope(lengths, seconds) for seconds in runs),
        bounds=Bounds(at_most=1.15),
        length=lengths[-1],
        seconds=tuple(seconds[-1] for seconds in runs),
        curves=seed_curves("tensor_attention", effort.seeds, [float(length) for length in lengths], runs),
    )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent `b` of the power law `y = a x^b` that fits best, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def _step_seconds(seed: int, lengths: Sequence[int], repeats: int) -> list[float]:
    """Seconds of a training step at each length, the fastest of `repeats`; lengths are timed in turns."""
    task = make_task("parity")
    model = small_model(task, "tensor_attention", {}, width=32, heads=2, depth=1, initializer_range=0.02, seed=seed)
    rows = [examples(task, length=length, seed=seed, first=0, count=1) for length in lengths]
    best = [math.inf] * len(lengths)
    # The first turn fills caches and isn't counted.
    for turn in range(repeats + 1):
        for index, (tokens, labels) in enumerate(rows):
            started = time.perf_counter()
            loss: torch.Tensor = model(tokens, labels)
            loss.backward()
            if turn:
                best[index] = min(best[index], time.perf_counter() - started)
    return best


ROW = Row(
    name="tensor_time",
    claim="tensor attention at 16k tokens trains in time linear in the tokens: the slope of log time over log "
    "tokens is below 1.15 (Alman and Song 2023, arXiv 2310.04064)",
    method="forward and backward pass of one row through a layer of width 32 with two heads; the fastest of "
    f"{REPEATS}. The bound of 1.15 is ours",
    axes=Axes("tokens", "seconds per step", log_x=True, log_y=True),
    measure=measure,
    sources=("2310.04064",),
    timed=True,
)
