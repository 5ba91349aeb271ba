"""Norms, all computed in float32 at least."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.kernels import gated_norm

NORM_EPS = 1e-6


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 at least: what decays, gates' logarithms and norms are computed in, under autocast too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, returned in x's dtype.

    With `groups`, the mean is taken over each of so many equal parts of the last dimension. A gate is applied before
    the norm: `x * silu(gate)` is what is normalised (Mamba-2).
    """

    def __init__(self, width: int, eps: float = NORM_EPS, *, groups: int = 1):
        super().__init__()
        self.part = width // groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        parts = (-1, self.part)
        gate = None if gate is None else gate.unflatten(-1, parts)
        weight = self.weight if self.part == self.weight.numel() else self.weight.unflatten(0, parts)
        out = gated_norm(x.unflatten(-1, parts), weight, gate, eps=self.eps, gate_first=True)
        return out.flatten(-2)


class HeadNorm(nn.Module):
    """Normalises each head by its root mean square and multiplies by an activated gate, where there is one."""

    def __init__(self, width: int, activation: Literal["silu", "sigmoid"] = "silu"):
        super().__init__()
        self.norm = RMSNorm(width)
        self.activation: Literal["silu", "sigmoid"] = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`x: [B,T,H,V]`, `gate: [B,T,H*V]` or None -> `[B,T,H*V]` in x's dtype."""
        gate = None if gate is None else gate.unflatten(2, x.shape[2:])
        return gated_norm(x, self.norm.weight, gate, eps=self.norm.eps, activation=self.activation).flatten(2)


class HeadLayerNorm(nn.Module):
    """Normalises each head by its mean and variance: GroupNorm with one group per head, and a weight per channel."""

    def __init__(self, width: int, *, bias: bool = False, eps: float = NORM_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x: [B,T,H,V]` -> `[B,T,H*V]`, in float32 at least."""
        out = F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps).flatten(2) * self.weight
        return out if self.bias is None else out + self.bias


def l2norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """`x` divided by its length along the last dimension: `x / sqrt(sum(x^2) + eps)`."""
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
