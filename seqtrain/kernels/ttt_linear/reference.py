"""The definition of TTT-Linear: one loop over tokens, gradients by autograd."""

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import opaque
from seqtrain.kernels.documents import by_document
from seqtrain.kernels.ttt_linear.inner import InnerModel, pack, unpack, with_one


@opaque("ttt_linear_reference", like=lambda *x: (x[2], x[8]))
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    start: Tensor,
    weight: Tensor,
    bias: Tensor,
    shares: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ttt_linear`; `state` is given, what is learned is in its dtype, norms `[H,1,K]`."""
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

    out, state = by_document(loop, (q, k, v, rate), state, cu_seqlens)
    return out.to(v.dtype), state
