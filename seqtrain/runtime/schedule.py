"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable

from seqtrain.runtime.settings import ScheduleConfig


def _cosine(left: float) -> float:
    return 0.5 - 0.5 * math.cos(math.pi * left)


def _linear(left: float) -> float:
    return left


# How the rate falls from 1 to 0 as the share of the decay that is left falls from 1 to 0.
FALLS: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "wsd": _linear}


def learning_rate(schedule: ScheduleConfig, *, peak: float, steps: int, step: int) -> float:
    """The learning rate of `step` (0 is the first of `steps`): a straight rise to `peak`, then the schedule's fall.

    The first step has a rate above zero, the last of the warm-up has `peak`, and the last step of all has
    `peak * schedule.final_lr_ratio`.
    """
    first = round(schedule.warmup_fraction * steps)
    if step < first:
        return peak * (step + 1) / first
    if schedule.name == "wsd":
        first = max(first, steps - round(schedule.decay_fraction * steps))
    if step < first:
        return peak
    left = (steps - 1 - step) / max(steps - first, 1)
    final = schedule.final_lr_ratio
    return peak * (final + (1 - final) * FALLS[schedule.name](left))
