"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import hashlib
import json
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import read_json, replace_file
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.validation import FilePath

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps of a run."""

    # Shape after the warm-up: half a cosine, a straight line, constant with a straight end (warm-up, stable, decay),
    # constant, or refined by the gradient norms of an earlier run (Defazio and others 2023).
    name: Literal["cosine", "linear", "wsd", "constant", "refined"] = "cosine"
    # Share of all steps, at the start, over which the rate rises in a straight line from zero to optimizer.lr.
    warmup_fraction: Share = 0.02
    # wsd only: share of all steps, at the end, over which the rate falls.
    decay_fraction: Share = 0.2
    # Learning rate of the last step, as a share of optimizer.lr; not of constant.
    final_lr_ratio: Share = 0.1
    # refined only: output_dir of the earlier run, of which this one keeps a copy; empty: the shape is linear's.
    from_: FilePath = ""
    # refined only: norm of its gradients. l1 where the optimizer divides by their size (AdamW); l2 where it does not.
    norm: Literal["l1", "l2"] = "l1"

    @property
    def refines(self) -> bool:
        """Whether gradient norms give the shape."""
        return self.name == "refined" and bool(self.from_)


# Those that are constant for a while: a run may be made longer from there.
CONSTANT = ("wsd", "constant")
# What metrics.jsonl calls a norm, and the power of it that weighs a step.
NORMS = {"l1": ("grad_norm_l1", -1), "l2": ("grad_norm", -2)}
# Share of a run over which the median of gradient norms is taken.
SMOOTHED = 0.1

# How the rate falls from 1 to 0 as the share of the decay that is left falls from 1 to 0.
FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "linear": lambda left: left,
    "refined": lambda left: left,
    "wsd": lambda left: left,
}


def learning_rate(
    schedule: ScheduleConfig, *, peak: float, steps: int, step: int, refined: Sequence[float] = ()
) -> float:
    """The learning rate of `step` (0 is the first of `steps`): a straight rise to `peak`, then the schedule's fall.

    The first step has a rate above zero, the last of the warm-up has `peak`, and the last step of all has
    `peak * schedule.final_lr_ratio`. `refined`: what `refine` gives; of its rise and the straight one the lower counts.
    """
    first, last = plateau(schedule, steps)
    final = schedule.final_lr_ratio
    rising = peak * (step + 1) / first if step < first else peak
    if refined:
        return min(rising, peak * (final + (1 - final) * refined[step]))
    if step < last:
        return rising
    left = (steps - 1 - step) / max(steps - last, 1)
    return peak * (final + (1 - final) * FALLS[schedule.name](left))


def plateau(schedule: ScheduleConfig, steps: int) -> tuple[int, int]:
    """The first step after the warm-up, and the step at which the fall begins; steps between them have the peak."""
    first = round(schedule.warmup_fraction * steps)
    falls = {"constant": steps, "wsd": steps - round(schedule.decay_fraction * steps)}
    return first, max(first, falls.get(schedule.name, first))


def refine(norms: Sequence[float], steps: int, *, power: int) -> list[float]:
    """The refined schedule of `steps` steps, at most 1, 0 in the last: `w_t sum_{s > t} w_s`, normalised.

    `norms`: of the gradients of a run, evenly over it; smoothed, `G_t`, they weigh a step by `w_t = G_t^power`.
    Algorithms 1 and 2 of Defazio, Cutkosky, Mehta and Mishchenko 2023, "When, Why and How Much? Adaptive Learning Rate
    Scheduling by Refinement". Nothing without norms.
    """
    if not norms:
        return []
    smooth = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(norms)), _medians(norms))
    weights = (smooth / smooth.min()) ** power
    later = weights[::-1].cumsum()[::-1] - weights
    found = weights * later
    return (found / max(found.max(), np.finfo(float).tiny)).tolist()


def _medians(values: Sequence[float]) -> list[float]:
    """The median around each value, over `SMOOTHED` of all; before the first it is repeated, the end is mirrored."""
    half = int(SMOOTHED * len(values)) // 2
    padded = [*[values[0]] * half, *values, *list(values[-2 : -2 - half : -1])]
    window = sorted(padded[: 2 * half])
    found = []
    for old, new in zip(padded, padded[2 * half :], strict=False):
        insort(window, new)
        found.append(window[half])
        del window[bisect_left(window, old)]
    return found


def gradient_norms(schedule: ScheduleConfig, folder: RunFolder) -> tuple[float, ...]:
    """What a refined schedule goes by: the copy in the run's own `folder`, else from the run it names; else nothing.

    Raises `ConfigError` where that run has none.
    """
    if not schedule.refines:
        return ()
    if folder.schedule.exists():
        try:
            stored: dict[str, Any] = read_json(folder.schedule)
            return tuple(map(float, stored["norms"]))
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"{folder.schedule}: is damaged; put it back, or start over") from None
    key = f"schedule.from={schedule.from_}"
    metrics, name = RunFolder(Path(schedule.from_)).metrics, NORMS[schedule.norm][0]
    if not metrics.is_file():
        raise ConfigError(f"{key}: holds no metrics.jsonl; name the output_dir of a run")
    norms = tuple(record[name] for record in read_lines(metrics) if record.get(name))
    if not norms:
        other = "" if schedule.norm == "l2" else "; use schedule.norm=l2, or a run with metrics.every above 0"
        raise ConfigError(f"{key}: its metrics.jsonl has no {name}{other}")
    return norms


def keep_norms(norms: Sequence[float], schedule: ScheduleConfig, folder: RunFolder) -> None:
    """Writes the copy that the run in `folder` resumes with."""
    if norms:
        kept = {"from": schedule.from_, "norm": schedule.norm, "norms": norms}
        replace_file(folder.schedule, json.dumps(kept).encode())


def digest(norms: Sequence[float]) -> str:
    """A hash of all of them."""
    return hashlib.sha256(json.dumps(norms).encode()).hexdigest()
