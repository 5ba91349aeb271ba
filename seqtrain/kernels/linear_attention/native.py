"""Linear attention with decay by the native CPU kernels."""

from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.native.recurrence import find_map, read, run, serves

__all__ = ["find_map", "read", "run", "serves", "step", "unavailable"]

# The library has a way of its own for single tokens.
step = run
