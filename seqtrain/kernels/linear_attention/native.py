"""Linear attention with decay by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.linear_attention import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable

__all__ = ["find_map", "read", "run", "step", "unavailable"]


def run(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Native `linear_attention`; arguments as those of the chunked form."""
    if others[1].dtype == torch.float64:
        return chunked.run(q, k, v, *others)
    return recurrence.run(q, k, v, None, *others)


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    return (chunked if torch.float64 in (k.dtype, v.dtype) else recurrence).find_map(k, v, log_decay)


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """As that of the chunked form."""
    return (chunked if state.dtype == torch.float64 else recurrence).read(q, log_decay, state, scale, out)


# The library has a way of its own for single tokens.
step = run
