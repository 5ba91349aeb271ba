"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 3.1 and appendix E)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked


class MultiQueryRecall(Task):
    """Pairs of a key and a value, then the keys again in another order; at each the answer is its value.

    Token 0 fills the gaps, then come the ids of keys, then those of values. The distance from the pairs to a query
    follows a power law, as in the paper.
    """

    @dataclass(frozen=True)
    class Config:
        # Pairs a row. Each is asked for once.
        pairs: Annotated[int, Field(gt=0)] = 16
        # Different keys; a row draws its own without repetition.
        keys: Annotated[int, Field(gt=0)] = 128
        # Different values; drawn with repetition.
        values: Annotated[int, Field(gt=1)] = 128
        # Probability of a gap of g slots before a query is in proportion to g ** (power - 1): small asks early.
        power: Annotated[float, Field(gt=0, le=1)] = 0.01

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if config.pairs > config.keys:
            raise self.config_error("pairs", f"a row can't have more different keys than data.task.keys={config.keys}")
        self.vocab_size, self.chance = 1 + config.keys + config.values, 1 / config.values
        # A pair takes two tokens, and so does a query: the value could follow it.
        self.shortest = 4 * config.pairs

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs = self.config.pairs
        keys = 1 + draw.permutation(self.config.keys)[:pairs]
        values = 1 + self.config.keys + draw.integers(self.config.values, size=pairs)
        tokens, labels = np.zeros(length, dtype=np.int64), nothing_asked(length)
        tokens[: 2 * pairs : 2] = keys
        tokens[1 : 2 * pairs : 2] = values
        slots = (length - 2 * pairs) // 2
        weight = np.arange(1, slots + 1) ** (self.config.power - 1)
        place = 2 * pairs + 2 * draw.choice(slots, size=pairs, replace=False, p=weight / weight.sum())
        tokens[place] = keys
        labels[place] = values
        return tokens, labels
