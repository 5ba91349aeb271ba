"""Which source the n-th row of a run is from, in closed form: no step is counted to know what came before another."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

# A weight along a run: `(step, weight)`, straight between steps, level before the first and after the last.
Weight = Sequence[tuple[int, float]]
# Moments in the time that a row takes: two rows of one source never fall due in the same.
MOMENTS = 2**8
# Shares are whole numbers of so many parts, so that every machine computes the same.
WHOLE = 2**40


class Shares:
    """The rows of sources whose shares follow from their weights, `batch_size` rows a step.

    A source is due S(x) of the first x rows, the integral of its share, and its j-th row falls due when S reaches
    j - 1/2 (Webster's method of apportionment); rows are read in the order in which they fall due. So each source has
    had its share at every time, up to half a row and the share that it has of the others' halves.
    """

    def __init__(self, weights: Sequence[Weight], batch_size: int):
        self.batch_size = batch_size
        steps = sorted({step for weight in weights for step, _ in weight})
        self._shares = [_parts([weight_at(weight, step) for weight in weights]) for step in steps]
        self._knots = [step * batch_size for step in steps]
        # Twice what is due at each knot; before the first one, shares are level.
        self._due = [[2 * self._knots[0] * share for share in self._shares[0]]]
        for number in range(1, len(steps)):
            length = self._knots[number] - self._knots[number - 1]
            ends = zip(self._due[-1], self._shares[number - 1], self._shares[number], strict=True)
            self._due.append([due + length * (before + after) for due, before, after in ends])
        self.counts = lru_cache(maxsize=64)(self._counts)

    def at(self, step: int) -> list[float]:
        """The sources' shares of the rows at `step`; their sum is 1."""
        number, length, after = self._piece(step * self.batch_size)
        since = step * self.batch_size - self._knots[number]
        ends = zip(self._shares[number], after, strict=True)
        return [(first + (last - first) * since / length) / WHOLE for first, last in ends]

    def deal(self, step: int) -> list[tuple[int, int]]:
        """`(source, which of its rows, from 0 on)` for every row of step `step`, from 0 on: evenly mixed."""
        first, last = (self.counts(number * self.batch_size) for number in (step, step + 1))
        places = [
            ((2 * (row - start) + 1) / (stop - start), source, row)
            for source, (start, stop) in enumerate(zip(first, last, strict=True))
            for row in range(start, stop)
        ]
        return [(source, row) for _, source, row in sorted(places)]

    def _counts(self, rows: int) -> tuple[int, ...]:
        """How many of a run's first `rows` rows are of each source."""
        if rows == 0:
            return (0,) * len(self._shares[0])
        # Each source is due at most half a row more or less than it has.
        span = len(self._shares[0])
        moments = range(max(0, (rows - span) * MOMENTS), (rows + span) * MOMENTS)
        place = bisect_left(moments, rows, key=lambda moment: sum(self._fallen_due(moment)))
        counts, after = (self._fallen_due(moments[place] - ago) for ago in (1, 0))
        missing = rows - sum(counts)
        for source in [source for source, count in enumerate(counts) if after[source] > count][:missing]:
            counts[source] += 1
        return tuple(counts)

    def _fallen_due(self, moment: int) -> list[int]:
        """How many rows of each source have fallen due."""
        number, length, after = self._piece(moment // MOMENTS)
        since, unit = moment - self._knots[number] * MOMENTS, 2 * WHOLE * MOMENTS**2 * length
        parts = zip(self._due[number], self._shares[number], after, strict=True)
        return [
            (due * MOMENTS**2 * length + 2 * since * MOMENTS * length * first + since**2 * (last - first) + unit // 2)
            // unit
            for due, first, last in parts
        ]

    def _piece(self, rows: int) -> tuple[int, int, list[int]]:
        """The last knot up to `rows` (else the first), the rows to the next, and the shares there."""
        number = max(bisect_right(self._knots, rows) - 1, 0)
        if rows < self._knots[0] or number + 1 == len(self._knots):
            return number, 1, self._shares[number]
        return number, self._knots[number + 1] - self._knots[number], self._shares[number + 1]


def _parts(weights: list[Fraction]) -> list[int]:
    """The shares of `weights`, in parts of `WHOLE`; what rounding leaves goes to the largest."""
    unit = WHOLE / sum(weights)
    parts = [int(weight * unit) for weight in weights]
    parts[parts.index(max(parts))] += WHOLE - sum(parts)
    return parts


def weight_at(weight: Weight, step: int) -> Fraction:
    """What `weight` is at `step`."""
    # Exact, also for 0.1.
    values = [(at, Fraction(str(value))) for at, value in weight]
    number = bisect_right([at for at, _ in values], step)
    if number in (0, len(values)):
        return values[max(number - 1, 0)][1]
    (start, before), (stop, after) = values[number - 1 : number + 1]
    return before + (after - before) * Fraction(step - start, stop - start)
