"""Short causal convolutions over time, and the shift by one token."""

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
