"""The definition: two sums of outer products, one loop over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention import tensor_attention
from seqtrain.kernels.tensor_attention.features import features


@tensor_attention.backend(like=lambda inputs, state: inputs[3].to(state.dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    """See `tensor_attention`; `out` comes back in the state's dtype."""
    (q, k1, k2, v1, v2), dtype = inputs, state.dtype
    q, k1, k2 = (features(x.to(dtype) * factor, degree) for x, factor in ((q, scale), (k1, 1.0), (k2, 1.0)))
    keys = torch.stack([k1, k2], 3)  # B T H 2 F
    values = torch.stack([F.pad(v.to(dtype), (0, 1), value=1.0) for v in (v1, v2)], 3)  # B T H 2 V+1

    def step(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state + keys[..., :, None] * values[..., None, :]  # B H 2 F V+1
        sums = torch.einsum("bhf,bhfv->bhv", q, state[:, :, 0] * state[:, :, 1])
        return sums[..., :-1] / sums[..., -1:], state

    return by_token(step, (q, keys, values), state, cu_seqlens, like=v1)
