"""Short causal convolutions over time, linear maps of the residual stream into heads, and maps of low rank."""

from typing import Literal

import torch
from torch import Tensor, nn

from seqtrain.kernels import short_convolution
from seqtrain.parallel.sequence import SequenceContext


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
        """Uniform in `+- width ** -0.5`, as PyTorch's own convolutions with one channel per group."""
        for parameter in self.parameters():
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        """`x: [B,T,channels]`, `past: [B,(width-1)*dilation,channels]` -> the same pair after these tokens."""
        options = {"activation": self.activation, "dilation": self.dilation}
        return sequence.run(short_convolution, x, self.weight, self.bias, initial_state=past, **options)


def token_shift(x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
    """The token before each of `x: [B,T,D]`, zero before the first; and the last token `[B,1,D]`, its state."""
    taps = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device).expand(x.shape[2], 2)
    return sequence.run(short_convolution, x, taps, initial_state=past)


class HeadProjections(nn.Module):
    """One matrix, then (where `conv_width > 0`) one short convolution with SiLU, split into tensors of heads."""

    def __init__(self, width: int, heads: int, widths: tuple[int, ...], *, conv_width: int = 0):
        super().__init__()
        self.heads = heads
        self.channels = [heads * part for part in widths]
        self.linear = nn.Linear(width, sum(self.channels), bias=False)
        self.conv = ShortConvolution(sum(self.channels), conv_width) if conv_width else None

    def forward(
        self, x: Tensor, past: Tensor | None, sequence: SequenceContext
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """`x: [B,T,D]` -> a tensor `[B,T,H,width]` for each of `widths`, and `{"conv": state}` where there is one."""
        x = self.linear(x)
        state: dict[str, Tensor] = {}
        if self.conv is not None:
            x, state["conv"] = self.conv(x, past, sequence)
        return tuple(part.unflatten(2, (self.heads, -1)) for part in x.split(self.channels, 2)), state


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
