"""Cross-entropy of a linear layer's logits, a chunk of tokens at a time, so that `[tokens, vocab]` never exists."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_floating, check_shapes

IGNORED = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """`sum over labels != -100 of -log softmax(hidden @ weight.T)[label]`: a float32 scalar (float64 for float64
    inputs).

    `hidden`: `[n,D]`, `weight`: `[vocab,D]`, `labels`: int64 `[n]`, each in `[0, vocab)` or -100. `chunk`: tokens whose
    logits exist at one time. The softmax is float32; the products have hidden's dtype, or autocast's where that is on.

    Gradients are made in the forward pass, chunk by chunk, and only scaled in the backward pass: `weight` is not read
    again, so a ZeRO-3 parameter may be gone by then. Without gradients that work is left out. Raises `ValueError` for
    wrong arguments.
    """
    name = "linear_cross_entropy"
    check_shapes(name, {"hidden": (hidden, "n D"), "weight": (weight, "vocab D"), "labels": (labels, "n")})
    check_floating(name, {"hidden": hidden, "weight": weight})
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels has dtype {labels.dtype}, expected int64")
    if chunk < 1:
        raise ValueError(f"{name}: chunk={chunk}, expected at least 1 token")
    grads = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, *grads)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients asked for: of `hidden` in its dtype, of `weight` in the softmax's."""
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    soft = torch.promote_types(torch.float32, hidden.dtype)
    matrix = weight.to(product)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=soft) if need_weight else None
    loss = torch.zeros((), dtype=soft, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = hidden[start : start + chunk].to(product)
        label = labels[start : start + chunk, None]
        counted = label != IGNORED
        label = label.where(counted, 0)
        logits = (rows @ matrix.T).to(soft)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, label)
        logits.exp_()
        total = logits.sum(1, keepdim=True)
        loss += ((total.log() - chosen) * counted).sum()
        if not (need_hidden or need_weight):
            continue
        d_logits = logits.mul_(counted / total).scatter_add_(1, label, -counted.to(soft)).to(product)
        if d_hidden is not None:
            d_hidden[start : start + chunk] = d_logits @ matrix
        if d_weight is not None and product == soft:
            d_weight.addmm_(d_logits.T, rows)
        elif d_weight is not None:
            d_weight += d_logits.T @ rows
    return loss, d_hidden, d_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_hidden: bool, need_weight: bool
    ) -> Tensor:
        loss, d_hidden, d_weight = _loss_and_gradients(hidden, weight, labels, chunk, need_hidden, need_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        # Scaled before rounding: a bfloat16 scale would put up to 0.4% on every gradient.
        return (
            None if d_hidden is None else (d_hidden.to(scale.dtype) * scale).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )
