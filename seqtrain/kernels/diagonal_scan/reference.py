"""The definition: one loop over tokens."""

import torch
from torch import Tensor

from seqtrain.kernels.diagonal_scan import diagonal_scan
from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs


@diagonal_scan.backend(like=lambda inputs, state: inputs[0].to(state.dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`; `h` comes back in the state's dtype."""

    def step(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = log_a.exp() * state + x
        return state, state

    x, log_a = inputs
    log_a = log_a.to(torch.promote_types(log_a.dtype, torch.float32)).expand(x.shape)
    return by_token(step, (x, log_a), state, cu_seqlens, like=x)
