"""What a row of the fidelity table is made of: figures, each with the claim it stands for."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Effort:
    """How much a row may do."""

    # One training each.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Multiplies the steps of every training and the rows of every score; the claims are made for 1.
    scale: float = 1.0

    def of(self, count: int) -> int:
        """`count` steps or rows at this effort, one at least."""
        return max(1, round(count * self.scale))


@dataclass(frozen=True)
class Curve:
    """One line of a row's picture."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def seed_curves(
    name: str, seeds: Sequence[int], x: Sequence[float], rows: Sequence[Sequence[float]]
) -> tuple[Curve, ...]:
    """One line per seed, with the `y` of `rows`."""
    return tuple(Curve(f"{name}, seed {seed}", tuple(x), tuple(y)) for seed, y in zip(seeds, rows, strict=True))


@dataclass(frozen=True)
class Bounds:
    """What a claim says of a number: nothing, or from `at_least` to `at_most`."""

    at_least: float = -math.inf
    at_most: float = math.inf

    def __bool__(self) -> bool:
        return self != Bounds()

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        parts = [f">= {self.at_least:g}"] if self.at_least > -math.inf else []
        return " and ".join(parts + ([f"<= {self.at_most:g}"] if self.at_most < math.inf else []))


@dataclass(frozen=True)
class Figure:
    """A number measured once per seed, with what the claim says of it."""

    # What was measured, and on what.
    what: str
    # One per seed.
    values: tuple[float, ...]
    # Of the mean. Without any, a figure is there to be seen.
    bounds: Bounds = field(default_factory=Bounds)
    # What guessing gives; not a number where nothing is guessed.
    chance: float = math.nan
    # Tokens a training row, optimizer steps and seconds of each training; 0 and empty where nothing is trained.
    length: int = 0
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    # Of the model: numbers that are trained, and bytes it keeps of a row of `length` tokens; 0 where there is none.
    parameters: int = 0
    state_bytes: int = 0
    curves: tuple[Curve, ...] = field(default=(), repr=False)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def without_curves(self) -> "Figure":
        """The same figure, with nothing to draw but its bar."""
        return replace(self, curves=())

    @property
    def holds(self) -> bool | None:
        """Whether the mean lies within the bounds; None where there are none."""
        return self.mean in self.bounds if self.bounds else None


def joined(parts: Sequence[Figure]) -> Figure:
    """One figure of the same measurement with several seeds, in order; curves are those of the first."""
    first = parts[0]
    if any(part.what != first.what for part in parts):
        raise ValueError(f"figures of different measurements: {sorted({part.what for part in parts})}")
    return replace(
        first,
        values=tuple(value for part in parts for value in part.values),
        steps=tuple(steps for part in parts for steps in part.steps),
        seconds=tuple(seconds for part in parts for seconds in part.seconds),
    )


@dataclass(frozen=True)
class Axes:
    """How the curves of a row are drawn."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Row:
    """An experiment: `measure(effort)` gives its figures as they come."""

    name: str
    # The claim in one sentence, with the paper it is from.
    claim: str
    # What is trained on what, and what was tried on the way to these settings.
    method: str
    axes: Axes
    measure: Callable[[Effort], Iterator[Figure]]
    # The arXiv numbers of the papers whose claims these are.
    sources: tuple[str, ...]
    # What it is measured with where the command doesn't say.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Whether its figures are times, which other work on the machine would change.
    timed: bool = False
    # The fixed numbers of the experiment, by name: what a report needs to be repeated.
    settings: Mapping[str, object] = field(default_factory=dict)
