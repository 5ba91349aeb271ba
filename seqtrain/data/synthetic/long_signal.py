"""Classifying a digitised signal by what it did long ago: a small stand-in for sequential image and audio tasks."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked


class LongSignal(Task):
    """A wave of one of several frequencies, at the start of the row only, under noise that lasts to its end.

    At the last token the answer is the frequency's number. Ids: the levels the signal is rounded to, then the answers.
    """

    @dataclass(frozen=True)
    class Config:
        # Frequencies, evenly spaced over octaves from 1/32 to 1/4 of a cycle a token.
        classes: Annotated[int, Field(ge=2, le=32)] = 8
        # Share of the row that holds the wave.
        share: Annotated[float, Field(gt=0, le=1)] = 0.25
        # Deviation of the noise, in amplitudes of the wave.
        noise: Annotated[float, Field(ge=0)] = 0.2
        # Levels the signal is rounded to, from -2 to 2 amplitudes.
        levels: Annotated[int, Field(ge=2)] = 32

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance = config.levels + config.classes, 1 / config.classes
        # Neighboring frequencies must differ by something while the wave lasts.
        self.shortest = math.ceil(8 / config.share)

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        levels, classes = self.config.levels, self.config.classes
        answer = int(draw.integers(classes))
        frequency = 2 ** (-5 + 3 * answer / (classes - 1))
        count = round(length * self.config.share)
        signal = self.config.noise * draw.standard_normal(length)
        signal[:count] += np.cos(2 * math.pi * (frequency * np.arange(count) + draw.random()))
        labels = nothing_asked(length)
        labels[-1] = levels + answer
        # The answer's own id never occurs: every token is a level.
        return np.clip(((signal + 2) / 4 * levels).astype(np.int64), 0, levels - 1), labels
