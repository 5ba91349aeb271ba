"""Short causal convolution along time, one filter a channel."""

from typing import Literal

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose
from seqtrain.kernels.documents import state_dtype


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu", "none"] = "none",
    dilation: int = 1,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`out_t = activation(bias + sum_j weight[:, W-1-j] * x_{t - j*dilation})`, causal, within a document.

    `x`: `[B,T,D]`, floating. `weight`: `[D,W]`, the last column for the token itself. `bias`: `[D]` or None.
    `dilation`: tokens from one input of an output to the next.
    `initial_state`: `[B,S,D]` with `S = past_tokens(weight, dilation)`, the inputs before the first token, oldest first
    (zeros when None); `[N,S,D]` with documents.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1).

    Returns `out`, `[B,T,D]` in x's dtype, and the last S inputs of each row or document, float32 (float64 for float64
    inputs). Raises `ValueError` for a wrong shape, dtype, device, activation, dilation or backend.
    """
    name = "short_convolution"
    tensors = {"x": (x, "B T D"), "weight": (weight, "D W")} | ({} if bias is None else {"bias": (bias, "D")})
    sizes = check_shapes(name, tensors)
    check_floating(name, {key: tensor for key, (tensor, _) in tensors.items()})
    if activation not in ("silu", "none"):
        raise ValueError(f"{name}: activation={activation!r}, expected 'silu' or 'none'")
    if dilation < 1:
        raise ValueError(f"{name}: dilation={dilation}, expected at least 1")
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    expected = (states, past_tokens(weight, dilation), sizes["D"])
    check_state(name, initial_state, expected, x.device)
    run = choose(name, backend, x.device, single_token=sizes["T"] == 1 and cu_seqlens is None)
    dtype = state_dtype(x.dtype)
    if initial_state is None:
        initial_state = torch.zeros(expected, dtype=dtype, device=x.device)
    return run(x, weight, bias, activation, dilation, initial_state.to(dtype), cu_seqlens)


def past_tokens(weight: Tensor, dilation: int = 1) -> int:
    """Inputs of the past that a convolution with `weight: [D,W]` needs: the tokens of its state."""
    return (weight.shape[1] - 1) * dilation
