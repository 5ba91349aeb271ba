"""The delta rule, without `read` and `erase`, by the native CPU kernels."""

from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.native.recurrence import run, serves

__all__ = ["run", "serves", "step", "unavailable"]

# The library has a way of its own for single tokens.
step = run
