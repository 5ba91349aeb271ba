"""The definition of linear attention with decay (docs/math.md, 1.1): one loop over tokens, gradients by autograd."""

from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.linear_attention import linear_attention
from seqtrain.kernels.operator import Inputs


@linear_attention.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`S_t = diag(a_t) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t`."""

    def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(state.dtype) for x in (q, k, v))
        if log_decay is not None:
            a = log_decay.to(state.dtype).exp()
            state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
        state = state + k[..., None] * v[:, :, None, :]
        return scale * (q[:, :, None, :] @ state)[:, :, 0], state

    out, state = by_token(step, inputs, state, cu_seqlens, like=inputs[2])
    return out.to(inputs[2].dtype), state
