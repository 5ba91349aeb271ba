"""The definition of the delta rule with decay (docs/math.md, 1.2): one loop over tokens, gradients by autograd."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document


@opaque("delta_rule_reference", like=lambda *x: (x[2], x[5]))
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    read: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = (I - beta_t erase_t^T read_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t`, `o_t = scale q_t S_t`."""
    read, erase = k if read is None else read, k if erase is None else erase

    def loop(*tensors: Any) -> tuple[Tensor, Tensor]:
        q, k, v, beta, read, erase, log_decay, state = tensors
        out: list[Tensor] = []
        for t in range(q.shape[1]):
            if log_decay is not None:
                a = log_decay[:, t].to(state.dtype).exp()
                state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
            query, key, value, asked, taken = (x[:, t, :, None, :].to(state.dtype) for x in (q, k, v, read, erase))
            held = asked @ state  # B H 1 V
            strength = beta[:, t, :, None, None].to(state.dtype)
            state = state + key.mT * (strength * value) - taken.mT * (strength * held)
            out.append(scale * (query @ state)[:, :, 0])
        return (torch.stack(out, 1) if out else v.to(state.dtype)), state

    out, state = by_document(loop, (q, k, v, beta, read, erase, log_decay), state, cu_seqlens)
    return out.to(v.dtype), state
