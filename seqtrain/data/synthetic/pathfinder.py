"""Pathfinder (Linsley et al. 2018, arXiv 1805.08315; Long Range Arena, arXiv 2011.04006): are two dots on one path?"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked

EMPTY, PATH, DOT = 0, 1, 2
# Steps in the four directions, in the order of a turn to the left.
DIRECTIONS = ((0, 1), (-1, 0), (0, -1), (1, 0))
# The chance that a path turns at a step.
TURN = 0.25


class Pathfinder(Task):
    """An image row by row: two paths that don't touch, a dot at two ends, of one of them or of both.

    A generated image, coarser than the published ones: paths are lines of pixels of `share * side` each, without gaps.
    At the last token the answer is whether one path connects the dots. Ids: empty, path, dot; the answers no and yes.
    """

    @dataclass(frozen=True)
    class Config:
        # Pixels of the image's side; a row has its square, and is filled up in front.
        side: Annotated[int, Field(ge=8, le=256)] = 16
        # Pixels of a path over those of the side.
        share: Annotated[float, Field(gt=0.2, le=2)] = 0.75

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance, self.shortest = 5, 0.5, config.side**2

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        side, pixels = self.config.side, round(self.config.share * self.config.side)
        while True:
            taken = np.zeros((side + 2, side + 2), dtype=bool)
            paths = [self._path(taken, pixels, draw) for _ in range(2)]
            if all(paths):
                break
        image = np.zeros((side, side), dtype=np.int64)
        for path in paths:
            image[tuple(np.array(path).T)] = PATH
        connected = int(draw.integers(2))
        first, second = draw.permutation(2)
        ends = (paths[first][0], paths[first][-1]) if connected else (paths[first][0], paths[second][-1])
        for end in ends:
            image[end] = DOT
        tokens, labels = np.full(length, EMPTY, dtype=np.int64), nothing_asked(length)
        tokens[length - side * side :] = image.flatten()
        labels[-1] = DOT + 1 + connected
        return tokens, labels

    def _path(self, taken: np.ndarray, pixels: int, draw: np.random.Generator) -> list[tuple[int, int]]:
        """Places of a path that touches nothing `taken`, which it then is; empty where it ran into something.

        `taken` has a border of one pixel.
        """
        side, direction = self.config.side, int(draw.integers(4))
        place = tuple(draw.integers(side, size=2).tolist())
        path: list[tuple[int, int]] = []
        while True:
            row, column = place
            if not (0 <= row < side and 0 <= column < side):
                return []
            # Nothing may be near it but the last two of its own.
            near = {(row + r, column + c) for r in (-1, 0, 1) for c in (-1, 0, 1)}
            if taken[row : row + 3, column : column + 3].any() or near & set(path[:-2]):
                return []
            path.append(place)
            if len(path) == pixels:
                break
            if draw.random() < TURN:
                direction = (direction + 1 + 2 * int(draw.integers(2))) % 4
            place = row + DIRECTIONS[direction][0], column + DIRECTIONS[direction][1]
        for row, column in path:
            taken[row + 1, column + 1] = True
        return path
