"""Points of a grid, one after the other along chosen axes, as LION reads them (arXiv 2407.18232)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task

# Of the points drawn one after the other, the share that touches one drawn before.
TOUCHING = 0.35


class PointCloud(Task):
    """Different points with whole coordinates, sorted; the answer at each is whether an earlier one touches it.

    Points touch that differ by one in one coordinate alone: neighbors along the last axis of the order come next to
    each other, others as far apart as the first axis has points between. So in groups of tokens, a point's neighbors
    are in its own group or an earlier one. Ids: the grid's points, x first, then the answers no and yes.
    """

    @dataclass(frozen=True)
    class Config:
        # Points along each axis of the grid.
        side: Annotated[int, Field(ge=3, le=32)] = 8
        # The axes by which points are sorted, the first one first.
        order: tuple[int, int, int] = (0, 1, 2)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if sorted(config.order) != [0, 1, 2]:
            raise self.config_error("order", "must name the axes 0, 1 and 2, each once")
        self.points = config.side**3
        self.vocab_size, self.chance = self.points + 2, 0.5

    def check(self, length: int) -> None:
        super().check(length)
        if 2 * length > self.points:
            raise self.config_error("side", f"a grid of {self.points} points is half full with {self.points // 2}")

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        side = self.config.side
        chosen: dict[tuple[int, ...], None] = {}
        while len(chosen) < length:
            point = draw.integers(side, size=3)
            if chosen and draw.random() < TOUCHING:
                point = np.array(list(chosen)[draw.integers(len(chosen))])
                point[draw.integers(3)] += 2 * draw.integers(2) - 1
            if (point >= 0).all() and (point < side).all():
                chosen.setdefault(tuple(point.tolist()))
        points = np.array(list(chosen))
        points = points[np.lexsort([points[:, axis] for axis in reversed(self.config.order)])]
        near = np.abs(points[:, None] - points).sum(-1) == 1
        labels = self.points + np.tril(near, -1).any(1)
        return points @ (side * side, side, 1), labels.astype(np.int64)
