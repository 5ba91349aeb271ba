"""The delta rule by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.delta_rule import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.operator import Inputs

__all__ = ["run", "step", "unavailable"]


def run(inputs: Inputs, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Native `delta_rule` without `read` and `erase`."""
    if state.dtype == torch.float64:
        return chunked.run(inputs, state, *others)
    return recurrence.run(inputs[:5], state, *others)


# The library has a way of its own for single tokens.
step = run
