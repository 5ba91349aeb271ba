"""The ways a scan can travel: a chain of blocks, a tree of composed maps, or everything to everyone (docs/math.md, 3).

A schedule is one class: what a place receives, how it runs, what it costs and how it is simulated. `SCHEDULES`
lists them: a new one is a file of this folder and its name there.
"""

import logging
from functools import cache

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.schedules.all_gather import AllGather
from seqtrain.parallel.schedules.base import Schedule
from seqtrain.parallel.schedules.links import Costs
from seqtrain.parallel.schedules.pipeline import Pipeline, Ring
from seqtrain.parallel.schedules.tree import Tree

log = logging.getLogger("seqtrain.parallel")

SCHEDULES: dict[str, type[Schedule]] = {schedule.name: schedule for schedule in (Pipeline, Tree, AllGather, Ring)}
ALGORITHMS = ("auto", *SCHEDULES)
# How far from the best a plan of fewer blocks may be, since blocks cost processor time that layers want, too. 128 KiB
# over 8 ranks, 1 ms, 100 Mbit/s: 32 blocks take 23.0 ms, 64 take 26.9 (the ranks shared two cores).
AS_GOOD = 1.02


@cache
def candidates(algorithm: str) -> tuple[Schedule, ...]:
    """The plans that `algorithm`, one of `ALGORITHMS` or as in "pipeline 4", leaves to choose from."""
    name, _, blocks = algorithm.partition(" ")
    if blocks:
        return (SCHEDULES[name](int(blocks)),)
    if algorithm == "auto":
        return tuple(plan for each in SCHEDULES.values() if each.automatic for plan in each.candidates())
    return SCHEDULES[algorithm].candidates()


@cache
def choose(costs: Costs, shape: AffineShape, places: int, item: int, algorithm: str) -> Schedule:
    """The cheapest plan of `algorithm`; `item`: bytes per number of the state."""
    allowed = candidates(algorithm)
    times = {plan: plan.seconds(costs, shape, places, item) for plan in allowed}
    fastest = min(times, key=lambda plan: times[plan])
    # Messages cost processor time that the layers want too: as few blocks as are as good.
    good = [p for p in allowed if p.name == fastest.name and times[p] <= AS_GOOD * times[fastest]]
    best = min(good, key=lambda plan: plan.blocks)
    log.info("all_scan %s over %d ranks: %s, about %.3g ms (%s)", shape, places, best, 1e3 * times[best], algorithm)
    return best


__all__ = ["ALGORITHMS", "SCHEDULES", "Costs", "Pipeline", "Schedule", "candidates", "choose"]
