"""The word problem of a symmetric group (Merrill et al. 2024, "The Illusion of State", arXiv 2404.08819)."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task


class Permutation(Task):
    """Every token is a permutation of a few things; the answer at it is the product of all so far.

    Ids number the permutations in lexicographic order, 0 the identity. With three things and more the group isn't
    commutative, with five it isn't solvable: then no constant number of layers with diagonal transitions suffices.
    """

    @dataclass(frozen=True)
    class Config:
        # Things that are permuted: 3 for S3 (6 permutations), 5 for S5 (120).
        things: Annotated[int, Field(ge=2, le=6)] = 5
        # Which permutations occur: all, or those that swap two things (a reflection each) and the identity.
        moves: Literal["all", "swaps"] = "all"

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._product, moved = _group(config.things)
        self._moves = np.flatnonzero(moved <= 2) if config.moves == "swaps" else np.arange(len(moved))
        self.vocab_size, self.chance = len(self._product), 1 / len(self._product)

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._moves[draw.integers(len(self._moves), size=length)]
        product, so_far = 0, []
        for move in tokens.tolist():
            product = self._product[move][product]
            so_far.append(product)
        return tokens, np.array(so_far)


@lru_cache
def _group(things: int) -> tuple[list[list[int]], np.ndarray]:
    """`(table, moved)`: `table[b][a]` is the id of "first a, then b", `moved` how many things each one moves."""
    elements = list(permutations(range(things)))
    number = {element: index for index, element in enumerate(elements)}
    table = [[number[tuple(b[i] for i in a)] for a in elements] for b in elements]
    return table, np.array([sum(i != image for i, image in enumerate(element)) for element in elements])
