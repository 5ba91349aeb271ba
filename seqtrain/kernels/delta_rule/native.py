"""The delta rule by the native CPU kernels; float64 inputs go to the chunked form."""

import torch
from torch import Tensor

from seqtrain.kernels.delta_rule import chunked
from seqtrain.kernels.native import recurrence
from seqtrain.kernels.native.build import unavailable

__all__ = ["run", "step", "unavailable"]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Native `delta_rule` without `read` and `erase`; arguments as `delta_rule` normalises them."""
    if state.dtype == torch.float64:
        return chunked.run(q, k, v, beta, log_decay, state, scale, cu_seqlens)
    return recurrence.run(q, k, v, beta, log_decay, state, scale, cu_seqlens)


# The library has a way of its own for single tokens.
step = run
