"""Selective copying (Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 3.1, after Jing et al. 2019)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked


class SelectiveCopy(Task):
    """Symbols at random places among blanks, then as many marks; at the n-th mark the answer is the n-th symbol.

    Token 0 is the blank, 1 the mark, then come the symbols.
    """

    @dataclass(frozen=True)
    class Config:
        # Symbols to be copied, a row.
        copied: Annotated[int, Field(gt=0)] = 16
        # Different symbols.
        symbols: Annotated[int, Field(gt=1)] = 16

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance, self.shortest = 2 + config.symbols, 1 / config.symbols, 2 * config.copied

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        copied = self.config.copied
        tokens, labels = np.zeros(length, dtype=np.int64), nothing_asked(length)
        symbols = 2 + draw.integers(self.config.symbols, size=copied)
        tokens[np.sort(draw.choice(length - copied, size=copied, replace=False))] = symbols
        tokens[-copied:] = 1
        labels[-copied:] = symbols
        return tokens, labels
