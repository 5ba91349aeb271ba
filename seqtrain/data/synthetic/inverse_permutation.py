"""Inverting a permutation, which a decoder can't without tokens that come after it (2025, arXiv 2509.24125)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked

FILLING = 0


class InversePermutation(Task):
    """Symbols in a random order, each with the place it belongs to; the answers are the symbols in the right order.

    Token i is the place `p_i` with the symbol `s_i`, and the i-th answer the symbol whose place is i. It is asked
    `scratch` tokens after token i, which hold nothing. Without them a causal model knows it only if that symbol came
    before. Ids: filling, before the row's `things` too; place * symbols + symbol; the answers.
    """

    @dataclass(frozen=True)
    class Config:
        # Things that are permuted.
        things: Annotated[int, Field(ge=2, le=256)] = 8
        # Different symbols; drawn with repetition.
        symbols: Annotated[int, Field(ge=2, le=1024)] = 16
        # Tokens after the things, by as many of which answers are asked later; with as many as things all are known.
        scratch: Annotated[int, Field(ge=0)] = 0

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance = 1 + (config.things + 1) * config.symbols, 1 / config.symbols
        self.shortest = config.things + config.scratch

    @property
    def ceiling(self) -> float:
        """The share of right answers that no causal model can exceed, in the mean over rows."""
        things, scratch = self.config.things, self.config.scratch
        known = sum(min(things, seen + scratch) for seen in range(1, things + 1)) / things**2
        return known + (1 - known) / self.config.symbols

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        things, symbols = self.config.things, self.config.symbols
        first = length - self.shortest
        place, symbol = draw.permutation(things), draw.integers(symbols, size=things)
        tokens, labels = np.full(length, FILLING, dtype=np.int64), nothing_asked(length)
        tokens[first : first + things] = 1 + place * symbols + symbol
        answers = labels[first + self.config.scratch :]
        answers[place] = 1 + things * symbols + symbol
        return tokens, labels
