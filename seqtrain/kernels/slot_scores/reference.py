"""The definition: one token after the other."""

from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.slot_scores import slot_scores


@slot_scores.backend(like=lambda inputs, state: inputs[2].to(inputs[0].dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`slot_scores` token by token."""

    def step(q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        query, key, taken = (x.to(state.dtype) for x in (q, k, written))
        state = state * log_decay.to(state.dtype).exp()[..., None] + taken[..., None] * key[:, :, None]
        return scale * (state @ query[..., None])[..., 0], state

    out, state = by_token(step, inputs, state, cu_seqlens, like=inputs[2])
    return out.to(inputs[0].dtype), state
