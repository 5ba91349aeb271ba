"""Tensor attention by the native CPU kernels; float64 inputs go to the chunked form."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.native import tensor_attention
from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.tensor_attention import chunked

__all__ = ["run", "step", "unavailable"]


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Native `tensor_attention`; arguments as those of the chunked form."""
    return (chunked if arguments[7].dtype == torch.float64 else tensor_attention).run(*arguments)


# Token by token is how it goes anyway.
step = run
