"""The definition: two sums of outer products, one loop over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document
from seqtrain.kernels.tensor_attention.features import features


@opaque("tensor_attention_reference", like=lambda *x: (x[3].to(x[7].dtype), x[7]))
def run(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    degree: int,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `tensor_attention`; `state` is given, and `out` comes back in its dtype."""
    dtype = state.dtype
    q, k1, k2 = (features(x.to(dtype) * factor, degree) for x, factor in ((q, scale), (k1, 1.0), (k2, 1.0)))
    keys = torch.stack([k1, k2], 3)  # B T H 2 F
    values = torch.stack([F.pad(v.to(dtype), (0, 1), value=1.0) for v in (v1, v2)], 3)  # B T H 2 V+1

    def one(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for t in range(q.shape[1]):
            state = state + keys[:, t, ..., :, None] * values[:, t, ..., None, :]  # B H 2 F V+1
            sums = torch.einsum("bhf,bhfv->bhv", q[:, t], state[:, :, 0] * state[:, :, 1])
            rows.append(sums[..., :-1] / sums[..., -1:])
        return torch.stack(rows, 1) if rows else values[:, :, :, 0, :-1], state

    return by_document(one, (q, keys, values), state, cu_seqlens)
