"""The definition of TTT-Linear: one loop over tokens, gradients by autograd."""

import torch
from torch import Tensor

from seqtrain.kernels.documents import by_document
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.ttt_linear import ttt_linear
from seqtrain.kernels.ttt_linear.inner import InnerModel, pack, unpack, with_one


@ttt_linear.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `ttt_linear`; what is learned is in the state's dtype, norms `[H,1,K]`."""
    *tokens, start, weight, bias, shares = inputs
    model = InnerModel(start, weight, bias, shares)

    def loop(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        change, total, count = unpack(state)
        out = []
        for t in range(q.shape[1]):
            query, key, value = (x[:, t, :, None].to(state.dtype) for x in (q, k, v))  # B H 1 K
            gradient = model.error_gradient(with_one(key) @ (start + change), value - key)
            total = total + rate[:, t, :, None, None].to(state.dtype) * (with_one(key).mT @ gradient)
            now = change - shares[count][:, None, None, None] * total
            out.append((query + model.norm(with_one(query) @ (start + now)))[:, :, 0])
            last = (count == len(shares) - 1)[:, None, None, None]
            change, total = torch.where(last, now, change), total.masked_fill(last, 0)
            count = (count + 1) % len(shares)
        return (torch.stack(out, 1) if out else v.to(state.dtype)), pack(change, total, count)

    out, state = by_document(loop, tuple(tokens), state, cu_seqlens)
    return out.to(inputs[2].dtype), state
