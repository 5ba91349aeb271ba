"""Losses towards a teacher. Gradients are found in the forward pass, so that little need be kept until the backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.data.batches import IGNORED
from seqtrain.layers import upcast


def relative_error_sum(came: Tensor, expected: Tensor, labels: Tensor) -> Tensor:
    """`sum of |came - expected|^2 / |expected|^2` over tokens whose label counts: a float32 scalar.

    `came`, `expected`: `[B,T,D]`; `labels`: int64 `[B,T]`, -100 for a token that does not count.
    """
    came, expected = upcast(came), upcast(expected)
    # A token whose output is all zero would else count without bound.
    size = expected.square().sum(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    error = (came - expected).square().sum(-1) / size
    return (error * (labels != IGNORED)).sum()


def mean_square_sum(came: Tensor, expected: Tensor, labels: Tensor) -> Tensor:
    """`sum of mean((came - expected)^2)` over tokens whose label counts; shapes as in `relative_error_sum`."""
    error = (upcast(came) - upcast(expected)).square().mean(-1)
    return (error * (labels != IGNORED)).sum()


def norm_sum(came: Tensor, expected: Tensor, labels: Tensor) -> Tensor:
    """`sum of |came - expected| / sqrt(D)` over tokens whose label counts; shapes as in `relative_error_sum`."""
    error = torch.linalg.vector_norm(upcast(came) - upcast(expected), dim=-1) * came.shape[-1] ** -0.5
    return (error * (labels != IGNORED)).sum()


def distillation_sum(
    hidden: Tensor,
    weight: Tensor,
    expected: Tensor | None,
    expected_weight: Tensor | None,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float,
    chunk: int,
) -> Tensor:
    """`kl * temperature^2 * KL(teacher | student) + ce * cross-entropy`, summed over labels that count: a scalar.

    `hidden`, `expected`: `[n,D]`, what both heads are given; `weight`, `expected_weight`: `[vocab,D]`, the heads;
    None for the teacher's where `kl` is 0. `labels`: int64 `[n]`. The KL is of distributions over the next token at
    `temperature` (its square keeps the gradient's size, Hinton et al. 2015, arXiv 1503.02531); the cross-entropy is at
    temperature 1. `chunk`: tokens whose logits exist at one time. The softmax is float32 at least.
    """
    need = torch.is_grad_enabled()
    inputs = [tensor for tensor in (hidden, weight) if need and tensor.requires_grad]
    total = torch.zeros((), dtype=torch.promote_types(torch.float32, hidden.dtype), device=hidden.device)
    d_hidden = torch.empty_like(hidden) if need and hidden.requires_grad else None
    d_weight = torch.zeros_like(weight, dtype=total.dtype) if need and weight.requires_grad else None
    with torch.no_grad():
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            teacher = None
            if expected is not None and expected_weight is not None:
                teacher = upcast(expected[start : start + chunk] @ expected_weight.T)
            loss, d_logits = _chunk(
                upcast(rows @ weight.T), teacher, labels[start : start + chunk, None], kl, ce, temperature
            )
            total += loss
            if d_hidden is not None:
                d_hidden[start : start + chunk] = d_logits.to(weight.dtype) @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ upcast(rows)
    return known(total, inputs, [grad for grad in (d_hidden, d_weight) if grad is not None])


def _chunk(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, kl: float, ce: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk's `logits: [n,vocab]`, and its gradient."""
    counted = labels != IGNORED
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    if teacher is not None:
        log_q, log_p = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        p = log_p.exp()
        loss = kl * temperature**2 * ((p * (log_p - log_q)).sum(1, keepdim=True) * counted).sum()
        gradient = log_q.exp_().sub_(p).mul_(kl * temperature)
    if ce:
        label = labels.where(counted, 0)
        log_q = logits.log_softmax(1)
        loss = loss - ce * (log_q.gather(1, label) * counted).sum()
        gradient.add_(log_q.exp_(), alpha=ce).scatter_add_(1, label, torch.full_like(label, -ce, dtype=logits.dtype))
    return loss, gradient.mul_(counted)


def with_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """`loss` with its gradients found at once: all that was kept for them is free again.

    `inputs`: every tensor the loss is to have gradients for, all of them leaves.
    """
    if not loss.requires_grad:
        return loss
    return known(loss, inputs, torch.autograd.grad(loss, inputs, materialize_grads=True))


def known(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The scalar `loss`, whose gradient by each of `inputs` is known already."""
    return _Known.apply(loss.detach(), len(inputs), *inputs, *gradients)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.dtypes = [tensor.dtype for tensor in tensors[:count]]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        gradients = ctx.saved_tensors
        # Scaled before they are rounded to the input's dtype.
        scaled = [(grad * grads[0]).to(dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, *scaled, *[None] * len(gradients)
