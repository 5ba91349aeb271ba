"""What RWKV-6 and RWKV-7 share: every projection reads its own blend of a token with the one before it."""

from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.layers import HeadLayerNorm, Linear
from seqtrain.mixers.common.base import LayerShape, Mixer


class RWKVMixer(Mixer):
    """The parts both have: r (what reads), k, v, the bonus of a token for itself, the norm of heads, out."""

    def __init__(self, config: Any, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.part_of_width()
        width, inner = shape.width, shape.channels
        self.r = Linear(width, inner, bias=False)
        self.k = Linear(width, inner, bias=False)
        self.v = Linear(width, inner, bias=False)
        self.bonus = nn.Parameter(torch.empty(inner))
        self.norm = HeadLayerNorm(inner, bias=True, eps=1e-5 * self.head)
        self.out = self.output(shape.channels)

    def to_heads(self, x: Tensor) -> Tensor:
        """`[...,D]` -> `[...,H,K]`."""
        return x.unflatten(-1, (self.shape.heads, self.head))


def blends(x: Tensor, difference: Tensor, mixes: Tensor) -> list[Tensor]:
    """`x + difference * mix` for each part of `mixes: [n*D]`; `difference`: the token before less `x`, `[B,T,D]`."""
    width = x.shape[-1]
    return [x + difference * mix.to(x.dtype) for mix in mixes.split(width)]


def depth_ratios(shape: LayerShape) -> tuple[float, float]:
    """How far up a layer stands: from 0 to 1 over the layers, and from 1 down to `1 / depth`."""
    return shape.index / max(shape.depth - 1, 1), 1 - shape.index / shape.depth


def ramp(channels: int) -> Tensor:
    """`n / channels` for each channel n."""
    return torch.arange(channels, dtype=torch.float32, device="cpu") / channels
