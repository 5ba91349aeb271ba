"""Short causal convolution along time, one filter per channel."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import PastInputs


def past_tokens(weight: Tensor, dilation: int = 1) -> int:
    """Inputs of the past that a convolution with `weight: [D,W]` needs: the tokens of its state."""
    return (weight.shape[1] - 1) * dilation


@operator(
    arguments={"x": "B T D", "weight": "D W", "bias": "D"},
    out="B T D",
    state=lambda *, W, D, dilation=1, **_: ((W - 1) * dilation, D),
    flops=lambda *, B, T, D, W, **_: 2 * B * T * D * W,
    backends=("reference", "chunked", "native", "triton", "causal_conv1d"),
    time=PastInputs(lambda tensors, options: past_tokens(tensors[1], options.get("dilation", 1))),
)
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
    if activation not in ("silu", "none"):
        raise ValueError(f"short_convolution: activation={activation!r}, expected 'silu' or 'none'")
    if dilation < 1:
        raise ValueError(f"short_convolution: dilation={dilation}, expected at least 1")
    tensors = (x, weight, bias)
    call = short_convolution.prepare(tensors, backend, initial_state, cu_seqlens, dilation=dilation)
    return call.run(tensors, call.state, cu_seqlens, activation, dilation)


@short_convolution.backend(like=lambda inputs, state: inputs[0])
def reference(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, activation: str, dilation: int
) -> tuple[Tensor, Tensor]:
    """The definition: a window over the last inputs, moved token by token."""
    x, weight, bias = inputs
    taps = weight.to(state.dtype).T  # W D

    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([state, x.to(state.dtype)[:, None]], 1)  # B (W-1)*dilation+1 D
        row = (window[:, ::dilation] * taps).sum(1)
        row = row if bias is None else row + bias.to(row.dtype)
        return F.silu(row) if activation == "silu" else row, window[:, 1:]

    out, final = by_token(step, (x,), state, cu_seqlens, like=x)
    return out.to(x.dtype), final
