"""Layers that only encoders can have: every token sees its whole document. One file each, found by name."""

from seqtrain.mixers import Mixer
from seqtrain.registry import Registry

ENCODERS: Registry[Mixer] = Registry("mixer", "seqtrain.encoders", Mixer)

__all__ = ["ENCODERS"]
