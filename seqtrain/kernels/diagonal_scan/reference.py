"""The definition: one loop over tokens."""

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document


@opaque("diagonal_scan_reference", like=lambda x, _, state, __: (x.to(state.dtype), state))
def run(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`; `state` is given, and `h` comes back in its dtype."""

    def one(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for t in range(x.shape[1]):
            state = log_a[:, t].exp() * state + x[:, t]
            rows.append(state)
        return torch.stack(rows, 1) if rows else x.to(state.dtype), state

    log_a = log_a.to(torch.promote_types(log_a.dtype, torch.float32)).expand(x.shape)
    return by_document(one, (x, log_a), state, cu_seqlens)
