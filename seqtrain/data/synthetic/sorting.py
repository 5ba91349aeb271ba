"""Sorting ("Order Matters", Vinyals et al. 2015, arXiv 1511.06391): numbers, then the same from the least on."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked

ASKED = 0


class Sorting(Task):
    """Numbers in the row's first half; in the second, which holds nothing, the i-th answer is the i-th least of them.

    Numbers may repeat. Ids: what asks, which also fills a row of odd length up, then the numbers.
    """

    @dataclass(frozen=True)
    class Config:
        # Different numbers.
        numbers: Annotated[int, Field(ge=2)] = 64

    config: Config
    shortest = 2

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance = 1 + config.numbers, 1 / config.numbers

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        count = length // 2
        numbers = 1 + draw.integers(self.config.numbers, size=count)
        tokens, labels = np.full(length, ASKED, dtype=np.int64), nothing_asked(length)
        tokens[length - 2 * count : length - count] = numbers
        labels[length - count :] = np.sort(numbers)
        return tokens, labels
