"""RG-LRU (Griffin, De et al. 2024, arXiv 2402.19427, section 2.4): a gated linear recurrence in a gated block."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize, normal
from seqtrain.kernels import diagonal_scan
from seqtrain.layers import Linear, ShortConvolution, fused, positions, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State

# The paper's c: log a = -c softplus(L) r.
POWER = 8.0


class BlockLinear(nn.Module):
    """`heads` square matrices, each on its own part of the channels, and a bias."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width))
        self.bias = nn.Parameter(torch.empty(heads * width))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.weight: normal(self.weight.shape[1] ** -0.5), self.bias: constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[B,T,H*width]` -> the same."""
        heads, width, _ = self.weight.shape
        parts = x.reshape(-1, heads, width).transpose(0, 1)  # H BT width
        out = torch.bmm(parts, self.weight.to(x.dtype)).transpose(0, 1).reshape(x.shape)
        return out + self.bias


class RGLRU(Mixer):
    """`h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * v_t)`, `a = exp(-8 softplus(L) r)`, times `gelu(W x)`.

    r and i are sigmoids of block-diagonal maps of v, which is a convolved projection of the layer's input.
    """

    class Config(MixerConfig):
        # Recurrent channels over model.width, all heads together; Griffin has 4/3, RecurrentGemma 1.
        expand: PositiveFloat = 1.0
        # Tokens under the short convolution before the recurrence.
        conv_width: Annotated[int, Field(ge=2, le=16)] = 4
        # Channels of a head; 0: as expand says.
        head_width: NonNegativeInt = 0
        # True: what a document's first token writes is not scaled by sqrt(1 - a^2), as in Griffin's own code.
        whole_start: bool = False

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = config.head_width or self.part_of_width(config.expand, "expand")
        self.hidden = shape.heads * self.head
        self.parts = fused(Linear(shape.width, 2 * self.hidden, bias=True), (-self.hidden, self.hidden))
        self.conv = ShortConvolution(self.hidden, config.conv_width, bias=True, activation="none")
        self.input_gate = BlockLinear(shape.heads, self.head)
        self.decay_gate = BlockLinear(shape.heads, self.head)
        self.rate = nn.Parameter(torch.empty(self.hidden))
        self.out = self.output(self.hidden, bias=True)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """`a` at an open gate, `exp(-8 softplus(L))`, is uniform in [0.9, 0.999]."""

        def fill(rate: Tensor, generator: torch.Generator | None) -> None:
            nn.init.uniform_(rate, 0.9, 0.999, generator=generator)
            rate.copy_(torch.expm1(-rate.log() / POWER).log())

        return {self.rate: fill}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        gate, v = self.parts(x).chunk(2, 2)
        v, conv = self.conv(v, past.get("conv"), sequence)
        log_a = -POWER * F.softplus(self.rate) * torch.sigmoid(upcast(self.decay_gate(v)))
        # Bounded away from 0, where the square root's slope has no bound.
        scale = (-torch.expm1(2 * log_a)).clamp(min=1e-7).sqrt()
        seen: State = {}
        if self.config.whole_start:
            place, seen["position"] = positions(x, past.get("position"), sequence)
            scale = scale.masked_fill((place == 0)[..., None], 1.0)
        written = scale * torch.sigmoid(upcast(self.input_gate(v))) * upcast(v)
        hidden, memory = sequence.run(diagonal_scan, written, log_a, initial_state=past.get("memory"))
        y = hidden.to(x.dtype) * F.gelu(gate, approximate="tanh")
        return self.out(y), {"conv": conv, "memory": memory, **seen}
