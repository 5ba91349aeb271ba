"""The definition of linear attention with decay (docs/math.md, 1.1): one loop over tokens, gradients by autograd."""

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document


@opaque("linear_attention_reference", like=lambda *x: (x[2], x[4]))
def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(a_t) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t`; arguments as `linear_attention` normalises them."""

    def loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(q.shape[1]):
            if log_decay is not None:
                a = log_decay[:, t].to(state.dtype).exp()
                state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
            state = state + k[:, t, :, :, None].to(state.dtype) * v[:, t, :, None, :].to(state.dtype)
            out.append(scale * (q[:, t, :, None, :].to(state.dtype) @ state)[:, :, 0])
        return (torch.stack(out, 1) if out else v.to(state.dtype)), state

    out, state = by_document(loop, (q, k, v, log_decay), state, cu_seqlens)
    return out.to(v.dtype), state
