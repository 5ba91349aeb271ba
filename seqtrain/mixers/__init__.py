"""Token mixers: one file each, found by name. A file is imported when its mixer is first asked for."""

from seqtrain.mixers.common.base import WHOLE, LayerShape, Mixer, MixerConfig, Past, State
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.registry import Registry

MIXERS: Registry[Mixer] = Registry("mixer", "seqtrain.mixers", Mixer)

__all__ = ["MIXERS", "WHOLE", "LayerShape", "Mixer", "MixerConfig", "Past", "SequenceContext", "State"]
