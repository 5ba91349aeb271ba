"""Cross-entropy of a linear layer's logits, a chunk of tokens at a time, so that `[tokens, vocab]` never exists."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.operator import operator

__all__ = ["IGNORED", "linear_cross_entropy", "soft_cap"]

IGNORED = -100


@operator(
    arguments={"hidden": "n D", "weight": "vocab D", "labels": "n"},
    kinds={"labels": "int64"},
    out="",
    flops=lambda *, n, D, vocab, **_: 2 * n * D * vocab,
    backends=("reference", "chunked", "native", "triton", "liger"),
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    cap: float = 0.0,
    losses: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sum over labels != -100 of -log softmax(hidden @ weight.T)[label]`: a scalar, float32 at least.

    `hidden`: `[n,D]`, `weight`: `[vocab,D]`, `labels`: int64 `[n]`, each in `[0, vocab)` or -100. `chunk`: tokens whose
    logits exist at one time. The softmax is float32; the products have hidden's dtype, or autocast's where that is on.
    `cap`: logits are `cap * tanh(logit / cap)` (Gemma 2); 0: as they are. `losses`: float32 `[n]` that is given each
    term of the sum, 0 for -100, without a gradient.

    Gradients are made in the forward pass, chunk by chunk, and only scaled in the backward pass: `weight` is not read
    again, so a ZeRO-3 parameter may be gone by then. Without gradients that work is left out. Raises `ValueError` for
    wrong arguments.
    """
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk={chunk}, expected at least 1 token")
    linear_cross_entropy.check((hidden, weight, labels))
    if cap < 0:
        raise ValueError(f"linear_cross_entropy: cap={cap}, expected 0 or more")
    return linear_cross_entropy.choose(backend, hidden.device)(hidden, weight, labels, chunk, cap, losses)


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None
) -> Tensor:
    """The definition: whole logits."""
    logits = soft_cap(hidden @ weight.T, cap)
    if losses is not None:
        losses.copy_(F.cross_entropy(logits.detach(), labels, ignore_index=IGNORED, reduction="none"))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)`, within `cap` in size; for 0, x itself."""
    return cap * torch.tanh(x / cap) if cap else x
