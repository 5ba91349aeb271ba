"""Tensor attention by the native CPU kernels; float64 inputs go to the chunked form."""

import torch
from torch import Tensor

from seqtrain.kernels.native import tensor_attention
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.tensor_attention import chunked

__all__ = ["run", "step", "unavailable"]


def run(
    inputs: tuple[Tensor, ...], degree: int, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Native `tensor_attention`; arguments as `tensor_attention` normalises them."""
    form = chunked if state.dtype == torch.float64 else tensor_attention
    return form.run(inputs, degree, scale, state, cu_seqlens)


# Token by token is how it goes anyway.
step = run
