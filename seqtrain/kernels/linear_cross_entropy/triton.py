"""The softmax of each chunk by one Triton kernel, which reads the logits twice and puts their gradient in their place.

Liger-Kernel's fused linear cross-entropy (`liger`) does the same, but rounds gradients to the weights' dtype before the
loss's own gradient scales them, waits for the GPU once a call, and cuts chunks by a rule of its own.
"""

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import NAMESPACE
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example
from seqtrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from seqtrain.kernels.linear_cross_entropy.chunked import chunk_by_chunk

__all__ = ["EXAMPLES", "run", "unavailable"]

PINNED = {name: Launch(warps=8, stages=2, sizes={"BV": 4096}) for name in gpu.TARGETS}

# The floor holds no logits at all, since the matrix products could be fused in.
EXAMPLES = (
    Example(
        "linear_cross_entropy vocab=32000",
        linear_cross_entropy,
        {"hidden": ("T D", "bfloat16"), "weight": ("vocab D", "bfloat16"), "labels": ("T", "int64")},
        {"B": 1, "D": 64, "vocab": 32000},
        {"chunk": 16},
        tokens=(16, 32),
    ),
)


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None) -> Tensor:
    """See `linear_cross_entropy`."""
    return chunk_by_chunk(hidden, weight, labels, chunk, cap, losses, _softmax)


def _softmax(logits: Tensor, labels: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    logits = logits.contiguous()
    losses = (_losses_op if torch.compiler.is_compiling() else _losses)(logits, labels, need_gradient)
    return losses, logits if need_gradient else None


def _losses(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """Of each row, in the dtype of sums; with `gradient`, that of `logits` takes their place."""
    from seqtrain.kernels.triton.softmax import cross_entropy

    losses = _empty_losses(logits, labels, gradient)
    flags = {"IGNORED": IGNORED, "GRADIENT": gradient, "ACC": gpu.triton_dtype(losses.dtype)}
    with gpu.on_device(logits):
        options = PINNED[gpu.target()].options(**flags)
        cross_entropy[(logits.shape[0],)](logits, labels.contiguous(), losses, logits.shape[1], **options)
    return losses


def _empty_losses(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(torch.float32, logits.dtype))


# Not `differentiable`: it is called where gradients are made by hand, and works in place.
_losses_op = torch.library.custom_op(f"{NAMESPACE}::cross_entropy_triton", _losses, mutates_args=("logits",))
_losses_op.register_fake(_empty_losses)
