"""TTT-Linear a mini-batch at a time, in its dual form: matrix products instead of one W per token.

With G the sum of gradients that the mini-batch has from before, `Z = [K, 1] W` and D the rows `rate * dZ`,

    [Q, 1] W_t = [Q, 1] W - shares * ([Q, 1] G + tril([Q, 1] [K, 1]^T) D)
"""

import torch
from torch import Tensor

from seqtrain.kernels.documents import by_document
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.ttt_linear import InnerModel, pack, ttt_linear, unpack, with_one


@ttt_linear.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `ttt_linear`; what is learned is in the state's dtype, norms `[H,1,K]`."""
    *tokens, start, weight, bias, shares = inputs
    model = InnerModel(start, weight, bias, shares)

    def rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        counts = unpack(state)[2].tolist()
        if len(set(counts)) > 1:
            # Rows in the midst of mini-batches at different tokens: one by one.
            singles = zip(*(x.split(1) for x in (q, k, v, rate, state)), strict=True)
            parts = [one(*single, count=count) for single, count in zip(singles, counts, strict=True)]
            return torch.cat([out for out, _ in parts]), torch.cat([final for _, final in parts])
        return one(q, k, v, rate, state, count=counts[0] if counts else 0)

    def one(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        change, total, _ = unpack(state)
        query, key, value = (x.to(state.dtype).transpose(1, 2) for x in (q, k, v))  # B H T K
        target, inputs, questions = value - key, with_one(key), with_one(query)
        rates = rate.to(state.dtype).transpose(1, 2)[..., None]  # B H T 1
        pieces, sizes = [], _mini_batches(q.shape[1], count, len(shares))
        # Split once: the gradient of a slice is as large as what it was cut from.
        for x, z, aim, step in zip(*(x.split(sizes, 2) for x in (inputs, questions, target, rates)), strict=True):
            memory = start + change
            gradient = model.error_gradient(x @ memory, aim) * step
            share = shares[count : count + x.shape[2], None]
            pieces.append(z @ memory - share * (z @ total + (z @ x.mT).tril() @ gradient))
            total = total + x.mT @ gradient
            count += x.shape[2]
            if count == len(shares):
                change, total, count = change - shares[-1] * total, torch.zeros_like(total), 0
        state = pack(change, total, torch.full((q.shape[0],), count, device=q.device))
        return (query + model.norm(torch.cat(pieces, 2))).transpose(1, 2), state

    out, state = by_document(rows, tuple(tokens), state, cu_seqlens)
    return out.to(inputs[2].dtype), state


def _mini_batches(tokens: int, count: int, size: int) -> list[int]:
    """Tokens of each mini-batch of `size`, the first of which has `count` from before; for none, one of 0."""
    first = min(size - count, tokens)
    whole, rest = divmod(tokens - first, size)
    return [first] + whole * [size] + ([rest] if rest else [])
