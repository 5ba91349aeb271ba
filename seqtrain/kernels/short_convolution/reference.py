"""The definition: a window over the last inputs, moved token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.short_convolution import short_convolution


@short_convolution.backend(like=lambda inputs, state: inputs[0])
def run(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, activation: str, dilation: int
) -> tuple[Tensor, Tensor]:
    """See `short_convolution`."""
    x, weight, bias = inputs
    taps = weight.to(state.dtype).T  # W D

    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([state, x.to(state.dtype)[:, None]], 1)  # B (W-1)*dilation+1 D
        row = (window[:, ::dilation] * taps).sum(1)
        row = row if bias is None else row + bias.to(row.dtype)
        return F.silu(row) if activation == "silu" else row, window[:, 1:]

    out, final = by_token(step, (x,), state, cu_seqlens, like=x)
    return out.to(x.dtype), final
