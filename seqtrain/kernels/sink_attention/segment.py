"""Attention over a window and sinks of a cut sequence: its state is the last keys and values, and the first."""

from seqtrain.kernels.segments import PastKeysAndSinks

SEGMENT = PastKeysAndSinks()
