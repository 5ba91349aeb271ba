"""Public parts of layers: norms, gates, short convolution, projections, rotary embedding, feature maps."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize, uniform
from seqtrain.kernels import gated_norm, short_convolution
from seqtrain.kernels.products import linear
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.tensor import ALONE, TensorParallel

NORM_EPS = 1e-6


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 at least: what decays, gates' logarithms and norms are computed in, under autocast too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """`nn.Linear` whose products, in float32 on a CPU, are by the fastest routine there is (`kernels.products`)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, returned in x's dtype.

    With `groups`, the mean is taken over each of so many equal parts of the last dimension. A gate is applied before
    the norm: `x * silu(gate)` is what is normalised (Mamba-2); with `gate_first=False` after it. With `tensor` the
    ranks have parts of what is normalised, `width` channels each; `groups` are those of all.
    `zero_centered`: what multiplies is `1 + weight`, and weights start at zero (Gemma).
    """

    def __init__(
        self,
        width: int,
        eps: float = NORM_EPS,
        *,
        groups: int = 1,
        zero_centered: bool = False,
        gate_first: bool = True,
        tensor: TensorParallel = ALONE,
    ):
        super().__init__()
        self.groups, self.tensor = groups, tensor
        self.part = width // max(1, groups // tensor.count)
        self.eps = eps
        self.zero_centered = zero_centered
        self.gate_first = gate_first
        self.weight = nn.Parameter(torch.empty(width))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.weight: constant(0.0 if self.zero_centered else 1.0)}

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.groups < self.tensor.count:
            weight = 1 + upcast(self.weight) if self.zero_centered else self.weight
            return shared_norm(
                x, weight, gate, self.tensor, groups=self.groups, eps=self.eps, gate_first=self.gate_first
            )
        parts = (-1, self.part)
        gate = None if gate is None else gate.unflatten(-1, parts)
        weight = 1 + upcast(self.weight) if self.zero_centered else self.weight
        weight = weight if self.part == weight.numel() else weight.unflatten(0, parts)
        out = gated_norm(x.unflatten(-1, parts), weight, gate, eps=self.eps, gate_first=self.gate_first)
        return out.flatten(-2)


def shared_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    tensor: TensorParallel,
    *,
    eps: float,
    groups: int = 1,
    activation: Callable[[Tensor], Tensor] = F.silu,
    gate_first: bool = False,
) -> Tensor:
    """`gated_norm` where `tensor`'s ranks have parts of what is normalised, `x: [...,V]`, as many for each group."""
    wide, gate = upcast(x), None if gate is None else activation(upcast(gate))
    if gate is not None and gate_first:
        wide = wide * gate
    squares = wide.square().sum(-1, keepdim=True)
    group = tensor.rank * groups // tensor.count
    sums = tensor.total(F.pad(squares, (group, groups - 1 - group)))
    mean = sums[..., group : group + 1] * groups / (x.shape[-1] * tensor.count)
    out = wide * torch.rsqrt(mean + eps) * weight
    return (out if gate is None or gate_first else out * gate).to(x.dtype)


class HeadNorm(nn.Module):
    """Normalises each head by its root mean square and multiplies by an activated gate, where there is one.

    With `tensor` there is one head, of which the ranks have parts.
    """

    def __init__(
        self,
        width: int,
        activation: Literal["silu", "sigmoid"] = "silu",
        eps: float = NORM_EPS,
        *,
        tensor: TensorParallel = ALONE,
    ):
        super().__init__()
        self.norm = RMSNorm(width, eps, tensor=tensor)
        self.activation: Literal["silu", "sigmoid"] = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`x: [B,T,H,V]`, `gate: [B,T,H*V]` or None -> `[B,T,H*V]` in x's dtype."""
        gate = None if gate is None else gate.unflatten(2, x.shape[2:])
        if (tensor := self.norm.tensor).count > 1:
            activation = F.silu if self.activation == "silu" else torch.sigmoid
            return shared_norm(x, self.norm.weight, gate, tensor, eps=self.norm.eps, activation=activation).flatten(2)
        return gated_norm(x, self.norm.weight, gate, eps=self.norm.eps, activation=self.activation).flatten(2)


class WidthNorm(nn.Module):
    """Normalises all heads together, by mean and variance with a weight and a bias, or by the root mean square alone.

    The first is LayerNorm; the second (`learned=False`) is TransNormer's SimpleRMSNorm, without parameters. With
    `tensor` the ranks have parts of the heads, `width` channels each.
    """

    def __init__(self, width: int, *, learned: bool, eps: float = NORM_EPS, tensor: TensorParallel = ALONE):
        super().__init__()
        self.eps, self.tensor = eps, tensor
        self.weight = nn.Parameter(torch.empty(width)) if learned else None
        self.bias = nn.Parameter(torch.empty(width)) if learned else None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        if self.weight is None or self.bias is None:
            return {}
        return {self.weight: constant(1.0), self.bias: constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`x: [B,T,H,V]` -> `[B,T,H*V]`, in float32 at least."""
        wide = upcast(x).flatten(2)
        if self.weight is not None:
            wide = wide - self._mean(wide)
        out = wide * torch.rsqrt(self._mean(wide.square()) + self.eps)
        return out if self.weight is None or self.bias is None else out * self.weight + self.bias

    def _mean(self, x: Tensor) -> Tensor:
        return self.tensor.total(x.sum(-1, keepdim=True)) / (x.shape[-1] * self.tensor.count)


class HeadLayerNorm(nn.Module):
    """Normalises each head by its mean and variance: GroupNorm with one group per head, and a weight per channel."""

    def __init__(self, width: int, *, bias: bool = False, eps: float = NORM_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        found: dict[Tensor, Initializer] = {self.weight: constant(1.0)}
        return found if self.bias is None else found | {self.bias: constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`x: [B,T,H,V]` -> `[B,T,H*V]`, in float32 at least."""
        out = F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps).flatten(2) * self.weight
        return out if self.bias is None else out + self.bias


def l2norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """`x` divided by its length along the last dimension: `x / sqrt(sum(x^2) + eps)`."""
    width = x.shape[-1]
    # The root mean square is the length over the root of the channels.
    return gated_norm(x, x.new_full((width,), width**-0.5, dtype=upcast(x[:0]).dtype), eps=eps / width)


def step_sizes(raw: Tensor, bias: Tensor) -> Tensor:
    """`softplus(raw + bias)`, in float32 at least."""
    return F.softplus(upcast(raw) + bias)


def log_forget(raw: Tensor, temperature: float = 1.0) -> Tensor:
    """`log(sigmoid(raw) ** (1 / temperature))`, in float32 at least: what a forget gate keeps, more if it is larger."""
    return F.logsigmoid(upcast(raw)) / temperature


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
        parts: Sequence[int] = (),
    ):
        """`parts`: as in `fused`."""
        super().__init__()
        self.tensor_parts = {"weight": (0, parts), "bias": (0, parts)}
        self.activation: Literal["silu", "none"] = activation
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """Uniform in `+- width ** -0.5`, as PyTorch's own convolutions with one channel per group."""
        bound = self.weight.shape[1] ** -0.5
        return dict.fromkeys(self.parameters(), uniform(-bound, bound))

    def forward(self, x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        """`x: [B,T,channels]`, `past: [B,(width-1)*dilation,channels]` -> the same pair after these tokens."""
        options = {"activation": self.activation, "dilation": self.dilation}
        return sequence.run(short_convolution, x, self.weight, self.bias, initial_state=past, **options)


def token_shift(x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
    """The token before each of `x: [B,T,D]`, zero before the first; and the last token `[B,1,D]`, its state."""
    taps = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device).expand(x.shape[2], 2)
    return sequence.run(short_convolution, x, taps, initial_state=past)


def fused(linear: nn.Linear, rows: Sequence[int], parts: Sequence[int] = ()) -> nn.Linear:
    """`linear`, several projections in one, told how many rows each has: to some optimizers each is a matrix.

    A head of queries, keys or values is a projection of its own. Negative numbers: rows that make gates, which none is.
    `parts`: neighboring rows that are divided over ranks apart from others, all heads' queries, say; empty: as `rows`.
    """
    assert sum(map(abs, rows)) == linear.out_features, (rows, linear)
    parts = parts or [abs(count) for count in rows]
    linear.fused_rows = tuple(rows)  # type: ignore[assignment]
    linear.tensor_parts = {"weight": (0, parts), "bias": (0, parts)}  # type: ignore[assignment]
    return linear


class HeadProjections(nn.Module):
    """One matrix, then (where `conv_width > 0`) one short convolution with SiLU, split into tensors of heads."""

    def __init__(
        self,
        width: int,
        heads: int | tuple[int, ...],
        widths: tuple[int, ...],
        *,
        conv_width: int = 0,
        activate: bool = False,
    ):
        """`heads`, `widths`: of each tensor; one number of heads is that of all.

        `activate`: SiLU where there is no convolution.
        """
        super().__init__()
        self.heads = heads if isinstance(heads, tuple) else (heads,) * len(widths)
        self.channels = [count * part for count, part in zip(self.heads, widths, strict=True)]
        rows = [part for count, part in zip(self.heads, widths, strict=True) for _ in range(count)]
        self.linear = fused(Linear(width, sum(self.channels), bias=False), rows, self.channels)
        self.conv = ShortConvolution(sum(self.channels), conv_width, parts=self.channels) if conv_width else None
        self.activate = activate and not conv_width

    def forward(
        self, x: Tensor, past: Tensor | None, sequence: SequenceContext
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """`x: [B,T,D]` -> a tensor `[B,T,heads,width]` for each, and `{"conv": state}` where there is one."""
        x = self.linear(x)
        state: dict[str, Tensor] = {}
        if self.conv is not None:
            x, state["conv"] = self.conv(x, past, sequence)
        elif self.activate:
            x = F.silu(x)
        parts = zip(x.split(self.channels, 2), self.heads, strict=True)
        return tuple(part.unflatten(2, (heads, -1)) for part, heads in parts), state


class LowRank(nn.Sequential):
    """`x -> up(activation(down(x)))`: a matrix of rank `rank` with an optional bias, linear without an activation."""

    def __init__(self, width: int, rank: int, out: int, *, bias: bool = False, activation: nn.Module | None = None):
        between = [] if activation is None else [activation]
        super().__init__(Linear(width, rank, bias=False), *between, Linear(rank, out, bias=bias))

    @property
    def offset(self) -> Tensor:
        """The bias, of one that has it."""
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last.bias


class Adapters(nn.ModuleList):
    """A `LowRank` for each of a projection's outputs, side by side: what a layer adds to a projection it shares."""

    def __init__(self, width: int, sizes: Sequence[int], rank: int):
        super().__init__(LowRank(width, rank, size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """`[...,width]` -> `[...,sum(sizes)]`."""
        return torch.cat([each(x) for each in self], -1)


def positions(x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
    """The place of each token of `x: [B,T,...]` in its row or document: int64 `[B,T]`, or `[1,T]` where all rows agree.

    `past`: int64 `[B]` (`[N]` with documents), tokens seen before; None for none. Returns it after these tokens, too.
    """
    batch, tokens = x.shape[:2]
    before, after = sequence.count(past, batch, tokens, x.device)
    return sequence.positions(tokens, x.device)[None] + before, after


def rotate(
    x: Tensor,
    place: Tensor,
    base: float,
    *,
    stretch: tuple[float, ...] = (),
    amplitude: float = 1.0,
    width: int | None = None,
) -> Tensor:
    """Turns channel pair i of `x: [B,T,H,K]` by the angle `place * base ** (-2i/K)`. `place`: int64 `[B or 1, T]`.

    Channel i pairs with channel `i + K/2`. Scores of rotated queries and keys depend on the distance of positions only.
    `stretch`: K/2 factors on the pairs' wavelengths, none for 1, and `amplitude`, a factor on the result: what models
    are given to read further than they were first trained (YaRN, arXiv 2309.00071; Llama 3.1). `width`: only so many
    channels are turned, the first ones, which then are the K of the formula; None: all.
    """
    if width is not None and width < x.shape[-1]:
        turned, rest = x.split([width, x.shape[-1] - width], -1)
        return torch.cat([rotate(turned, place, base, stretch=stretch, amplitude=amplitude), rest], -1)
    rate = rotation_rates(x.shape[-1], base, x.device)
    if stretch:
        rate = rate / torch.tensor(stretch, dtype=torch.float64, device=x.device)
    return turn(x, place[..., None, None] * rate, amplitude)


def rotation_rates(width: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """`base ** (-2i / width)`, radians a position, float64 `[width/2]`.

    float64 costs little on `[T, K/2]` and keeps far positions exact: 1e6 radians in float32 are 0.06 off.
    """
    half = width // 2
    return base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


def turn(x: Tensor, angle: Tensor, amplitude: float = 1.0) -> Tensor:
    """Turns channel pair `(i, i + K/2)` of `x: [B,T,H,K]` by `angle`, radians, broadcast to `[B,T,H,K/2]`."""
    wide = upcast(x)
    cos, sin = (amplitude * angle.cos()).to(wide.dtype), (amplitude * angle.sin()).to(wide.dtype)
    first, second = wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def taylor2(x: Tensor) -> Tensor:
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = q . k / sqrt(K)` (Based, arXiv 2402.18668, section 3.1).

    `[..., K]` -> `[..., 1 + K + K(K+1)/2]`: the square's symmetric products are merged, with weight sqrt(2).
    """
    width = x.shape[-1]
    x = x * width**-0.25
    row, column = torch.triu_indices(width, width, device=x.device)
    weight = torch.where(row == column, x.new_tensor(math.sqrt(0.5)), x.new_ones(()))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], -1)


def elu(x: Tensor) -> Tensor:
    """`elu(x) + 1`: positive, and `x + 1` for x > 0."""
    return F.elu(x) + 1


# Name -> (map, whether phi(q) . phi(k) >= 0, which a sum as normalizer needs).
FEATURE_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "identity": (lambda x: x, False),
    "elu": (elu, True),
    "plain_elu": (F.elu, False),
    "relu": (F.relu, True),
    "sigmoid": (torch.sigmoid, True),
    "taylor2": (taylor2, True),
}
