"""Linear attention with decay by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.linear_attention import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.operator import Inputs

__all__ = ["find_map", "read", "run", "step", "unavailable"]


def run(inputs: Inputs, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Native `linear_attention`."""
    if state.dtype == torch.float64:
        return chunked.run(inputs, state, *others)
    return recurrence.run((*inputs[:3], None, inputs[3]), state, *others)


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    return (chunked if torch.float64 in (k.dtype, v.dtype) else recurrence).find_map(k, v, log_decay)


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """As that of the chunked form."""
    return (chunked if state.dtype == torch.float64 else recurrence).read(q, log_decay, state, scale, out)


# The library has a way of its own for single tokens.
step = run
