"""Root-mean-square norm with a gate: what stands between a recurrence and a layer's last matrix."""

from typing import Literal

import torch
from torch import Tensor

from seqtrain.kernels.operator import operator

Activation = Literal["silu", "sigmoid"]


@operator(
    arguments={"x": "... H V", "weight": ("V", "H V"), "gate": "... H V"},
    out="... H V",
    flops=lambda **_: 0,
    backends=("reference", "chunked", "native", "triton"),
)
def gated_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float,
    activation: Activation = "silu",
    gate_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight * activation(gate)`, the mean over the last dimension.

    With `gate_first`, `x * activation(gate)` is what is normalised, and multiplied by `weight` alone (Mamba-2).

    `x`: `[...,H,V]`, floating. `weight`: `[V]`, or `[H,V]` where heads (or groups) have their own. `gate`: `[...,H,V]`
    or None. Computed in float32 (float64 for float64 x), returned in x's dtype and shape. Raises `ValueError` for a
    wrong shape, dtype, device, activation or backend.
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"gated_norm: activation={activation!r}, expected 'silu' or 'sigmoid'")
    # Norms are many and small: how their shapes fit is told by letters only where they don't.
    fits = x.shape[-weight.dim() :] == weight.shape and weight.dim() <= 2 and (gate is None or gate.shape == x.shape)
    if not fits or not all(each.is_floating_point() for each in (x, weight, gate) if each is not None):
        gated_norm.check((x, weight, gate))
    return gated_norm.choose(backend, x.device)(x, weight, gate, eps, activation == "silu", gate_first)


def reference(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """The definition."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.ones_like(wide)
    if gate is not None:
        gate = gate.to(wide.dtype)
        factor = 1 / (1 + torch.exp(-gate)) * (gate if silu else 1)
    if gate_first:
        wide, factor = wide * factor, torch.ones_like(wide)
    size = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (wide / size * weight * factor).to(x.dtype)


def token_rows(x: Tensor) -> Tensor:
    """`[...,H,V]` -> `[N,H*V]`; a slice of a wider projection stays where it is."""
    flat = x.flatten(-2).flatten(0, -2) if x.dim() > 2 else x.flatten()[None]
    return flat if flat.stride(1) == 1 else flat.contiguous()
