"""The inner model: a LayerNorm, the gradient of its error, and its state taken apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True)
class InnerModel:
    """What is learned of it once for all tokens; in the state's dtype."""

    start: Tensor  # [H,K+1,K]
    weight: Tensor  # [H,1,K]
    bias: Tensor  # [H,1,K]
    shares: Tensor  # [C]

    def norm(self, z: Tensor) -> Tensor:
        """`z: [B,H,T,K]` normalised to mean 0 and variance 1, times `weight`, plus `bias`."""
        return _standardised(z)[0] * self.weight + self.bias

    def error_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """The gradient in z of `|norm(z) - target|^2 / 2`, all `[B,H,T,K]`."""
        unit, inverse = _standardised(z)
        gradient = (unit * self.weight + self.bias - target) * self.weight
        # What changes the mean or the variance of z is taken out again by the norm.
        along = (gradient * unit).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True) - unit * along) * inverse


def _standardised(z: Tensor) -> tuple[Tensor, Tensor]:
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * inverse, inverse


def with_one(x: Tensor) -> Tensor:
    """`[...,K]` -> `[...,K+1]`: the input that meets the bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def unpack(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B,H,2K+3,K]` -> the change of W and the sum of gradients, `[B,H,K+1,K]` each, and the count, int64 `[B]`."""
    rows = state.shape[3] + 1
    change, total, count = state.split([rows, rows, 1], 2)
    return change, total, count[:, 0, 0, 0].round().to(torch.int64)


def pack(change: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """The reverse of `unpack`."""
    row = count.to(change.dtype).view(-1, 1, 1, 1).expand(-1, change.shape[1], 1, change.shape[3])
    return torch.cat([change, total, row], 2)
