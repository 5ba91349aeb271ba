"""The softmax of each chunk by one Triton kernel, which reads the logits twice and puts their gradient in their place.

Liger-Kernel's fused linear cross-entropy does the same but rounds gradients to the weights' dtype before the loss's own
gradient scales them, waits for the GPU once a call, and cuts chunks by a rule of its own: so it is not used here.
"""

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.gpu import Example, Launch, unavailable
from seqtrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from seqtrain.kernels.linear_cross_entropy.chunked import chunk_by_chunk

__all__ = ["EXAMPLES", "run", "unavailable"]

PINNED = {name: Launch(warps=8, stages=2, sizes={"BV": 4096}) for name in gpu.TARGETS}

# Beside a floor that holds no logits at all, for the products of matrices could be fused in.
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


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """See `linear_cross_entropy`."""
    return chunk_by_chunk(hidden, weight, labels, chunk, _softmax)


def _softmax(logits: Tensor, labels: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    from seqtrain.kernels.triton.softmax import cross_entropy

    logits = logits.contiguous()
    dtype = torch.promote_types(torch.float32, logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    flags = {"IGNORED": IGNORED, "GRADIENT": need_gradient, "ACC": gpu.triton_dtype(dtype)}
    with gpu.on_device(logits):
        cross_entropy[(logits.shape[0],)](
            logits, labels.contiguous(), losses, logits.shape[1], **flags, **PINNED[gpu.target()].options()
        )
    return losses.sum(), logits if need_gradient else None
