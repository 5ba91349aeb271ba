"""The definition: one token after the other."""

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document


@opaque("slot_scores_reference", like=lambda *x: (x[2].to(x[0].dtype), x[4]))
def run(
    q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`slot_scores` token by token; arguments as it normalises them."""

    def loop(q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(q.shape[1]):
            query, key, taken = (x[:, t].to(state.dtype) for x in (q, k, written))
            state = state * log_decay[:, t].to(state.dtype).exp()[..., None] + taken[..., None] * key[:, :, None]
            out.append(scale * (state @ query[..., None])[..., 0])
        return (torch.stack(out, 1) if out else written.to(state.dtype)), state

    out, state = by_document(loop, (q, k, written, log_decay), state, cu_seqlens)
    return out.to(q.dtype), state
