"""Third-order softmax attention itself: cubic in T, the measure of the Taylor form's error."""

import torch
from torch import Tensor

from seqtrain.kernels.documents import by_document


def run(inputs: tuple[Tensor, ...], scale: float, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """`tensor_attention` with `degree=None`: returns `out` alone."""

    def one(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = q.shape[1]
        scores = torch.einsum("bthr,bihr,bjhr->bhtij", q, k1, k2) * scale
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~(seen[:, :, None] & seen[:, None, :]), -torch.inf)
        weights = scores.flatten(3).softmax(-1).view(scores.shape)
        return torch.einsum("bhtij,bihv,bjhv->bthv", weights, v1, v2), state

    tensors = tuple(tensor.to(dtype) for tensor in inputs)
    states = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return by_document(one, tensors, tensors[0].new_zeros(states, 0), cu_seqlens)[0].to(inputs[3].dtype)
