"""The definition: a window over the last inputs, moved token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document


@opaque("short_convolution_reference", like=lambda *x: (x[0], x[5]))
def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    dilation: int,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `short_convolution`; `state` is given, in the dtype of the sums."""
    taps = weight.to(state.dtype).T  # W D

    def one(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x, dtype=state.dtype)
        rows = []
        for token in x.to(state.dtype).unbind(1):
            window = torch.cat([state, token[:, None]], 1)  # B (W-1)*dilation+1 D
            row = (window[:, ::dilation] * taps).sum(1)
            row = row if bias is None else row + bias.to(row.dtype)
            rows.append(F.silu(row) if activation == "silu" else row)
            state = window[:, 1:]
        return torch.stack(rows, 1) if rows else out, state

    out, final = by_document(one, (x,), state, cu_seqlens)
    return out.to(x.dtype), final
