"""The definition of the delta rule with decay (docs/math.md, 1.2): one loop over tokens, gradients by autograd."""

from typing import Any

from torch import Tensor

from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`S_t = (I - beta_t erase_t^T read_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t`, `o_t = scale q_t S_t`."""
    q, k, v, beta, log_decay, read, erase = inputs
    read, erase = k if read is None else read, k if erase is None else erase

    def step(*tensors: Any) -> tuple[Tensor, Tensor]:
        *vectors, beta, log_decay, state = tensors
        if log_decay is not None:
            a = log_decay.to(state.dtype).exp()
            state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
        query, key, value, asked, taken = (x[:, :, None, :].to(state.dtype) for x in vectors)
        held = asked @ state  # B H 1 V
        strength = beta[:, :, None, None].to(state.dtype)
        state = state + key.mT * (strength * value) - taken.mT * (strength * held)
        return scale * (query @ state)[:, :, 0], state

    out, state = by_token(step, (q, k, v, read, erase, beta, log_decay), state, cu_seqlens, like=v)
    return out.to(v.dtype), state
