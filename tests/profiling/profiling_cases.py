"""A clock that tests turn, and a model small enough to read the parts of."""

from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig


class CountingClock:
    """Every reading is one second after the one before."""

    def __init__(self):
        self.time = 0.0

    def mark(self):
        self.time += 1.0
        return self.time

    mark_here = mark

    def seconds(self, marks):
        return list(marks)


class SetClock(CountingClock):
    """Shows what `time` was set to."""

    def mark(self):
        return self.time

    mark_here = mark


def small_model(layers=("gla", "attention"), **options):
    config = ModelConfig(layers=layers, depth=2, width=16, heads=2, **options)
    return LanguageModel(config, {name: MIXERS.get(name).Config() for name in layers}, vocab_size=11)
