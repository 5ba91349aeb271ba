"""The PyTorch form, from its own fused norm; rows are few and independent, so that nothing is cut into chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def run(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """See `gated_norm`."""
    out = x.to(torch.promote_types(x.dtype, torch.float32))
    if gate is not None:
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        gate = F.silu(wide) if silu else torch.sigmoid(wide)
    if gate is not None and gate_first:
        out = out * gate
    out = F.rms_norm(out, out.shape[-1:], eps=eps) * weight
    if gate is not None and not gate_first:
        out = out * gate
    return out.to(x.dtype)
