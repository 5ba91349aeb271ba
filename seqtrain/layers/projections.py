"""Linear maps of the residual stream into heads, and maps of low rank."""

from torch import Tensor, nn

from seqtrain.layers.convolution import ShortConvolution
from seqtrain.parallel.sequence import SequenceContext


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
