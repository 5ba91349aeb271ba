"""Root-mean-square norm with a gate: what stands between a recurrence and a layer's last matrix."""

from typing import Literal

from torch import Tensor

from seqtrain.kernels.checks import check_floating, check_shapes
from seqtrain.kernels.dispatch import choose

Activation = Literal["silu", "sigmoid"]


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
    name = "gated_norm"
    # Norms are many and small: how their shapes fit is told by letters only where they don't.
    if x.shape[-weight.dim() :] != weight.shape or weight.dim() > 2 or (gate is not None and gate.shape != x.shape):
        shape = " ".join([*(f"d{i}" for i in range(x.dim() - 2)), "H V"])
        tensors = {"x": (x, shape), "weight": (weight, "V" if weight.dim() == 1 else "H V")}
        check_shapes(name, tensors if gate is None else tensors | {"gate": (gate, shape)})
    if not x.is_floating_point():
        check_floating(name, {"x": x})
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"{name}: activation={activation!r}, expected 'silu' or 'sigmoid'")
    return choose(name, backend, x.device)(x, weight, gate, eps, activation == "silu", gate_first)
