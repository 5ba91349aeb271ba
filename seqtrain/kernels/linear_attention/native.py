"""Linear attention with decay by the native CPU kernels; float64 inputs go to the chunked form."""

import torch
from torch import Tensor

from seqtrain.kernels.linear_attention import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable

__all__ = ["find_map", "read", "run", "step", "unavailable"]


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Native `linear_attention`; arguments as `linear_attention` normalises them."""
    if state.dtype == torch.float64:
        return chunked.run(q, k, v, log_decay, state, scale, cu_seqlens)
    return recurrence.run(q, k, v, None, log_decay, state, scale, cu_seqlens)


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    backend = chunked if torch.float64 in (k.dtype, v.dtype) else recurrence
    return backend.find_map(k, v, log_decay)


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """As that of the chunked form."""
    backend = chunked if state.dtype == torch.float64 else recurrence
    return backend.read(q, log_decay, state, scale, out)


# The library has a way of its own for single tokens.
step = run
