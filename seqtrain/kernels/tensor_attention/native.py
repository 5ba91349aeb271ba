"""Tensor attention by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.native import tensor_attention
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention import chunked

__all__ = ["run", "step", "unavailable"]


def run(inputs: Inputs, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Native `tensor_attention`."""
    return (chunked if state.dtype == torch.float64 else tensor_attention).run(inputs, state, *others)


# Token by token is how it goes anyway.
step = run
