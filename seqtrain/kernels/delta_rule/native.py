"""The delta rule by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.delta_rule import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable

__all__ = ["run", "step", "unavailable"]


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Native `delta_rule` without `read` and `erase`; arguments as those of the chunked form."""
    return (chunked if arguments[5].dtype == torch.float64 else recurrence).run(*arguments)


# The library has a way of its own for single tokens.
step = run
