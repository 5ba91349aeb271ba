"""The definition."""

import torch
from torch import Tensor


def run(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """See `gated_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.ones_like(wide)
    if gate is not None:
        gate = gate.to(wide.dtype)
        factor = 1 / (1 + torch.exp(-gate)) * (gate if silu else 1)
    if gate_first:
        wide, factor = wide * factor, torch.ones_like(wide)
    size = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (wide / size * weight * factor).to(x.dtype)
