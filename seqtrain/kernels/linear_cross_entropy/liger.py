"""Liger-Kernel's fused linear cross-entropy (pip install liger-kernel), its sums of weight gradients in float32.

It cuts chunks by a rule of its own, so that `chunk` says nothing to it, and waits for the GPU once a call.
"""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import outside
from seqtrain.kernels.linear_cross_entropy import IGNORED


def trials(device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of `run`, of small cases."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((70, 64), (500, 64)))
    labels = torch.randint(500, (70,), generator=generator).to(device)
    labels[::5] = IGNORED
    return [(hidden.bfloat16(), weight.bfloat16() / 8, labels, 32, cap) for cap in (0.0, 2.0)]


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    return outside.missing("liger_kernel", "liger-kernel")


def serves(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None
) -> bool:
    """Whether only the sum is asked for, both dtypes are the same 16 bits, and no graph is being made."""
    plain = losses is None and hidden.dtype == weight.dtype and hidden.dtype in outside.HALVES and len(hidden) > 0
    return plain and not torch.compiler.is_compiling()


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None) -> Tensor:
    """See `linear_cross_entropy`."""
    fused = outside.function("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    options = {"ignore_index": IGNORED, "reduction": "sum", "softcap": cap or None, "accum_dtype": torch.float32}
    loss: Tensor = fused(hidden, weight, labels, **options)
    return loss
