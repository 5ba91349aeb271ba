"""What mixers are made of beside their operator: norms, projections into heads, short convolutions, step sizes."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.kernels import gated_norm, short_convolution
from seqtrain.mixers._base import State
from seqtrain.mixers._costs import convolution_flops
from seqtrain.parallel.sequence import Sequence

NORM_EPS = 1e-6


def precise(x: Tensor) -> Tensor:
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
    """Normalises each head by its mean and variance: GroupNorm with a group a head, and a weight a channel of `H*V`."""

    def __init__(self, width: int, *, bias: bool = False, eps: float = NORM_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x: [B,T,H,V]` -> `[B,T,H*V]`, in float32 at least."""
        out = F.layer_norm(precise(x), x.shape[-1:], eps=self.eps).flatten(2) * self.weight
        return out if self.bias is None else out + self.bias


def unit(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """`x` divided by its length along the last dimension: `x / sqrt(sum(x^2) + eps)`."""
    wide = precise(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over `width` tokens, `dilation` apart; its state is the last inputs it needs."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = False,
        activation: Literal["silu", "none"] = "silu",
        dilation: int = 1,
    ):
        super().__init__()
        self.activation: Literal["silu", "none"] = activation
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform in `+- width ** -0.5`, as PyTorch's own convolutions with one channel a group."""
        for parameter in self.parameters():
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor, past: Tensor | None, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """`x: [B,T,channels]`, `past: [B,(width-1)*dilation,channels]` -> the same pair after these tokens."""
        options = {"activation": self.activation, "dilation": self.dilation}
        return sequence.run(short_convolution, x, self.weight, self.bias, initial_state=past, **options)


class HeadProjections(nn.Module):
    """One matrix, then (where `conv_width > 0`) one short convolution with SiLU, cut into tensors of heads."""

    def __init__(self, width: int, heads: int, widths: tuple[int, ...], *, conv_width: int = 0):
        super().__init__()
        self.width = width
        self.heads = heads
        self.channels = [heads * part for part in widths]
        self.conv_width = conv_width
        self.linear = nn.Linear(width, sum(self.channels), bias=False)
        self.conv = ShortConvolution(sum(self.channels), conv_width) if conv_width else None

    def forward(self, x: Tensor, past: Tensor | None, sequence: Sequence) -> tuple[tuple[Tensor, ...], State]:
        """`x: [B,T,D]` -> a tensor `[B,T,H,width]` for each of `widths`, and `{"conv": state}` where there is one."""
        x = self.linear(x)
        state = {}
        if self.conv is not None:
            x, state["conv"] = self.conv(x, past, sequence)
        return tuple(part.unflatten(2, (self.heads, -1)) for part in x.split(self.channels, 2)), state

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """`{"conv": [B,W-1,channels]}`, or nothing."""
        return {"conv": (batch, self.conv_width - 1, sum(self.channels))} if self.conv_width else {}

    def weights(self) -> tuple[int, int]:
        """Parameters of the matrix, and of the convolution."""
        return self.width * sum(self.channels), sum(self.channels) * self.conv_width

    def flops(self, tokens: int) -> int:
        """Of the convolution alone: `2 T W channels`."""
        return convolution_flops(tokens, sum(self.channels), self.conv_width)


def token_shift(x: Tensor, past: Tensor | None, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """The token before each of `x: [B,T,D]`, zero before the first; and the last token `[B,1,D]`, its state."""
    taps = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device).expand(x.shape[2], 2)
    return sequence.run(short_convolution, x, taps, initial_state=past)


class LowRank(nn.Sequential):
    """`x -> up(activation(down(x)))`: a matrix of rank `rank` with an optional bias, linear without an activation."""

    def __init__(self, width: int, rank: int, out: int, *, bias: bool = False, activation: nn.Module | None = None):
        between = [] if activation is None else [activation]
        super().__init__(nn.Linear(width, rank, bias=False), *between, nn.Linear(rank, out, bias=bias))

    @property
    def offset(self) -> Tensor:
        """The bias, of one that has it."""
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last.bias


def reset_step_bias(bias: Tensor, generator: torch.Generator | None, low: float = 1e-3, high: float = 1e-1) -> None:
    """Fills `bias` so that `softplus(bias)`, the step size of a zero input, is log-uniform in `[low, high]` (Mamba)."""
    with torch.no_grad():
        nn.init.uniform_(bias, math.log(low), math.log(high), generator=generator)
        # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
        step = bias.exp()
        bias.copy_(step + (-torch.expm1(-step)).log())


def reset_decay_rate(rate_log: Tensor, generator: torch.Generator | None, low: float = 1.0, high: float = 16.0) -> None:
    """Fills `rate_log` with the logarithm of numbers uniform in `[low, high]`: the `A_log` of Mamba-2."""
    with torch.no_grad():
        nn.init.uniform_(rate_log, low, high, generator=generator)
        rate_log.log_()


def step_sizes(raw: Tensor, bias: Tensor) -> Tensor:
    """`softplus(raw + bias)`, in float32 at least."""
    return F.softplus(precise(raw) + bias)
