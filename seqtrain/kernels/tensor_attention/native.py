"""Tensor attention by the native CPU kernels."""

from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.native.recurrence import serves
from seqtrain.kernels.native.tensor_attention import run

__all__ = ["run", "serves", "step", "unavailable"]

# Token by token is how it goes anyway.
step = run
