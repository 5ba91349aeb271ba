"""The products of each chunk by PyTorch, its softmax by the backend: here by PyTorch's operations, one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.linear_cross_entropy import IGNORED, soft_cap
from seqtrain.kernels.products import add_product_, product

# `softmax(logits, labels, need_gradient)`: the losses `[n]` of `logits [n,vocab]` in the softmax's dtype, and the
# gradient of the logits in theirs; it may spoil them.
Softmax = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None) -> Tensor:
    """See `linear_cross_entropy`."""
    return chunk_by_chunk(hidden, weight, labels, chunk, cap, losses, softmax)


def chunk_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    cap: float,
    losses: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    """`run`, with a softmax of one's own."""
    grads = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, cap, losses, softmax, *grads)


def softmax(logits: Tensor, labels: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See `Softmax`."""
    product = logits.dtype
    label = labels[:, None]
    counted = label != IGNORED
    label = label.where(counted, 0)
    logits = logits.to(torch.promote_types(torch.float32, product))
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, label)
    logits.exp_()
    total = logits.sum(1, keepdim=True)
    losses = ((total.log() - chosen) * counted)[:, 0]
    if not need_gradient:
        return losses, None
    return losses, logits.mul_(counted / total).scatter_add_(1, label, -counted.to(logits.dtype)).to(product)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    cap: float,
    losses: Tensor | None,
    softmax: Softmax,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients asked for: of `hidden` in its dtype, of `weight` in the softmax's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    soft = torch.promote_types(torch.float32, hidden.dtype)
    matrix = weight.to(dtype)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight: Tensor | None = None
    loss = torch.zeros((), dtype=soft, device=hidden.device)
    # The logits of all chunks, one after the other: memory of this size comes from the system page by page.
    room = None
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and hidden.shape[0] > chunk:
        room = torch.empty(chunk, matrix.shape[0], dtype=dtype)
    for start in range(0, hidden.shape[0], chunk):
        rows = hidden[start : start + chunk].to(dtype)
        logits = soft_cap(product(rows, matrix, into=None if room is None else room[: len(rows)]), cap)
        # The softmax may spoil them.
        slope = 1 - (logits / cap).square() if cap else None
        of_chunk, d_logits = softmax(logits, labels[start : start + chunk], need_hidden or need_weight)
        # Not in place: compiled by PyTorch 2.11, a result born without a gradient would have none.
        loss = loss + of_chunk.sum()
        if losses is not None:
            losses[start : start + chunk] = of_chunk
        if d_logits is None:
            continue
        if slope is not None:
            d_logits = d_logits * slope
        if d_hidden is not None:
            d_hidden[start : start + chunk] = product(d_logits, matrix.T)
        if need_weight and d_weight is None:
            d_weight = product(d_logits.T, rows.T).to(soft)
        elif d_weight is not None and dtype == soft:
            add_product_(d_weight, d_logits.T, rows.T)
        elif d_weight is not None:
            d_weight += d_logits.T @ rows
    if need_weight and d_weight is None:
        d_weight = torch.zeros_like(weight, dtype=soft)
    return loss, d_hidden, d_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, d_hidden, d_weight = _loss_and_gradients(*arguments)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = arguments[1].dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        # Scaled before rounding: a bfloat16 scale would put up to 0.4% on every gradient.
        d_hidden = None if d_hidden is None else (d_hidden.to(scale.dtype) * scale).to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, *7 * (None,)
