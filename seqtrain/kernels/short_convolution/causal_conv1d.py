"""causal-conv1d's CUDA kernels for the short convolution of whole rows (pip install causal-conv1d)."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import outside
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.short_convolution import short_convolution


def trials(device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of `run`, of small cases."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, state = (
        torch.randn(shape, generator=generator).to(device) for shape in ((2, 70, 64), (64, 4), (64,), (2, 3, 64))
    )
    halves = (x.bfloat16(), weight, bias)
    # States are inputs of the past: numbers of x's dtype.
    return [(halves, state.bfloat16().float(), None, name, 1) for name in ("silu", "none")]


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    return outside.missing("causal_conv1d", "causal-conv1d")


def serves(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, activation: str, dilation: int) -> bool:
    """Whether these are rows, not documents; 2 to 4 taps side by side; and channels that its loads take by eight."""
    x, weight, _ = inputs
    narrow = x.dtype in (*outside.HALVES, torch.float32) and weight.shape[1] in (2, 3, 4) and x.shape[2] % 8 == 0
    return cu_seqlens is None and dilation == 1 and narrow and x.shape[1] > 0


@short_convolution.backend(like=lambda inputs, state: inputs[0])
def run(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, activation: str, dilation: int
) -> tuple[Tensor, Tensor]:
    """causal-conv1d's `short_convolution`."""
    x, weight, bias = inputs
    # Channels lie next to each other, as its kernels for states need them.
    past = state.to(x.dtype).contiguous().mT
    out, final = outside.function("causal_conv1d", "causal_conv1d_fn")(
        x.contiguous().mT,
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        initial_states=past,
        return_final_states=True,
        activation=None if activation == "none" else activation,
    )
    return out.mT.contiguous(), final.mT.to(state.dtype)
