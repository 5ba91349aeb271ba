"""Match3: whether a triple adds up (Sanford et al. 2023, arXiv 2306.02896), in a causal form."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked


class Match3(Task):
    """Numbers below a modulus, then queries: is there a pair of numbers that adds up with the query to 0 mod M?

    In the paper every number of the row is a query against the whole row. A causal model sees less of it the earlier
    it is asked, and the share of positive answers would tell the place; so here a query is asked of the first part of
    the row, by an id of its own, and is positive or negative with equal chance. A number may be used twice.
    Ids: numbers, then queries, then the answers no and yes.
    """

    @dataclass(frozen=True)
    class Config:
        # M: numbers and sums are taken modulo it.
        modulus: Annotated[int, Field(gt=2)] = 32
        # Numbers before the queries. A row with few has few sums of pairs, and more queries to which the answer is no.
        numbers: Annotated[int, Field(gt=0)] = 6

    config: Config
    # Numbers that add up with a query.
    terms: ClassVar[int] = 2

    def __init__(self, config: Config):
        super().__init__(config)
        if (sums := math.comb(config.numbers + self.terms - 1, self.terms)) >= config.modulus:
            rule = f"all sums could occur among its {sums} of {self.terms}; these must be fewer than modulus="
            raise self.config_error("numbers", f"{rule}{config.modulus}")
        self.vocab_size, self.chance, self.shortest = 2 * config.modulus + 2, 0.5, config.numbers + 1

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        modulus, count = self.config.modulus, self.config.numbers
        numbers = draw.integers(modulus, size=count)
        matched = np.zeros(modulus, dtype=bool)
        sums = numbers
        for _ in range(self.terms - 1):
            sums = (sums[:, None] + numbers).flatten()
        matched[-sums % modulus] = True
        answers = draw.integers(2, size=length - count)
        queries = np.where(
            answers,
            draw.choice(np.flatnonzero(matched), size=length - count),
            draw.choice(np.flatnonzero(~matched), size=length - count),
        )
        labels = nothing_asked(length)
        labels[count:] = 2 * modulus + answers
        return np.concatenate([numbers, modulus + queries]), labels
