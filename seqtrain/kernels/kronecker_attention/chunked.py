"""Linear in T: the running sums of a few tokens at a time, computed again in the backward pass.

Order 3 has a better form of it in `tensor_attention`; with more keys the terms of a chunk that need no running sums
double with each, and what is left here is bound by memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_document
from seqtrain.kernels.kronecker_attention import kronecker_attention, query_features
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention import tensor_attention
from seqtrain.kernels.tensor_attention.features import features

# Numbers of the running sums that exist at one time: 4 MiB of float32.
NUMBERS = 1 << 20


@kronecker_attention.backend(like=lambda inputs, state: inputs[2][:, :, :, 0].to(state.dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    """See `kronecker_attention`; `out` comes back in the state's dtype."""
    q, keys, values = inputs
    if keys.shape[3] == 2:
        pairs = (*keys.unbind(3), *values.to(state.dtype).unbind(3))
        out, final = tensor_attention(q, *pairs, degree=degree, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
        assert final is not None
        return out, final

    def one(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if not q.shape[1]:
            return values[:, :, :, 0].to(state.dtype), state
        step, outs = max(1, NUMBERS // max(1, state.numel())), []
        for rows in zip(*(each.split(step, 1) for each in (q, keys, values)), strict=True):
            out, state = _Chunk.apply(*rows, state, scale, degree)
            outs.append(out)
        return torch.cat(outs, 1), state

    return by_document(one, (q, keys, values), state, cu_seqlens)


class _Chunk(torch.autograd.Function):
    """`_chunk`, computed again in the backward pass, there too without autocast."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:4])
        ctx.options = arguments[4:]
        return _chunk(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), full_precision(tensors[0].device):
            found = _chunk(*tensors, *ctx.options)
            return *torch.autograd.grad(found, tensors, gradients), None, None


def _chunk(q: Tensor, keys: Tensor, values: Tensor, state: Tensor, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    asked = query_features(q, degree, scale, state)
    columns = F.pad(values.to(state.dtype), (0, 1), value=1.0)
    added = features(keys.to(state.dtype), degree)[..., :, None] * columns[..., None, :]  # B T H R F V+1
    running = added.cumsum(1) + state[:, None]
    sums = torch.einsum("bthf,bthfv->bthv", asked, running.prod(3))
    return sums[..., :-1] / sums[..., -1:], running[:, -1]
