"""Induction heads (Olsson et al. 2022; the form of Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.2)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked


class Induction(Task):
    """Random symbols with one mark at a random place; at the mark that ends the row, the answer is what followed it.

    Ids: the symbols, then the mark.
    """

    @dataclass(frozen=True)
    class Config:
        # Different symbols.
        symbols: Annotated[int, Field(gt=1)] = 16

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance, self.shortest = config.symbols + 1, 1 / config.symbols, 3

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = draw.integers(self.config.symbols, size=length), nothing_asked(length)
        place = int(draw.integers(length - 2))
        tokens[[place, -1]] = self.config.symbols
        labels[-1] = tokens[place + 1]
        return tokens, labels
