"""Parity: the smallest state that no positive transition can track (Grazzi et al. 2024, arXiv 2411.12537)."""

from dataclasses import dataclass

import numpy as np

from seqtrain.data.synthetic._base import Task


class Parity(Task):
    """Random bits; the answer at every token is whether the ones so far are odd in number."""

    @dataclass(frozen=True)
    class Config:
        pass

    config: Config
    vocab_size, chance = 2, 0.5

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = draw.integers(2, size=length)
        return bits, np.cumsum(bits) % 2
