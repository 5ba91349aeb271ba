"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps of a run."""

    # Shape after the warm-up: half a cosine, a straight line, or constant with a straight end (warm-up, stable, decay).
    name: Literal["cosine", "linear", "wsd"] = "cosine"
    # Share of all steps, at the start, over which the rate rises in a straight line from zero to optimizer.lr.
    warmup_fraction: Share = 0.02
    # wsd only: share of all steps, at the end, over which the rate falls.
    decay_fraction: Share = 0.2
    # Learning rate of the last step, as a share of optimizer.lr.
    final_lr_ratio: Share = 0.1


# How the rate falls from 1 to 0 as the share of the decay that is left falls from 1 to 0.
FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "linear": lambda left: left,
    "wsd": lambda left: left,
}


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
