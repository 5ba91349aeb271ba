"""TTT-Linear ("Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, arXiv 2407.04620)."""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import ttt_linear
from seqtrain.layers import HeadNorm, HeadProjections, Linear, l2norm, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


class TTTLinear(Mixer):
    """The state is a linear model with a LayerNorm, `f(x) = x + LN(x W + b)`, that learns `f(k_t) = v_t` as it reads.

    One step of gradient descent a mini-batch of tokens, at rates the tokens choose; each token is answered by `f(q_t)`
    as learned from its mini-batch so far. The LayerNorm makes the state's update no affine map. Queries and keys have a
    root mean square of 1, where the paper rotates them by their place in the mini-batch.
    """

    class Config(MixerConfig):
        # Tokens of a mini-batch, whose gradients are all taken at the same state.
        mini_batch: Annotated[int, Field(gt=0, le=128)] = 16
        # Largest learning rate of the inner model: the rate for a gate of 1.
        base_rate: PositiveFloat = 1.0
        # Tokens under the short convolution of q, k and v; 0: none.
        conv_width: Annotated[int, Field(ge=0, le=16)] = 4

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.part_of_width()
        width, heads, inner = shape.width, shape.heads, shape.channels
        self.qkv = HeadProjections(width, heads, 3 * (self.head,), conv_width=config.conv_width)
        self.rate = Linear(width, heads)
        # Each head's first W, `[K+1,K]`, in one dimension, so that weight decay leaves it alone.
        self.start = nn.Parameter(torch.empty(heads * (self.head + 1) * self.head))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.norm_bias = nn.Parameter(torch.empty(inner))
        # What is added to 1 / (c + 1), the share of the gradients' sum that the c-th token of a mini-batch steps by.
        self.extra_share = nn.Parameter(torch.empty(config.mini_batch))
        self.gate = Linear(width, inner, bias=False)
        self.norm = HeadNorm(self.head)
        self.out = self.output(shape.channels)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """An inner model whose outputs have variance 1 before their norm, and steps by the mean gradient."""
        heads, head = self.shape.heads, self.head

        def start(tensor: Tensor, generator: torch.Generator | None) -> None:
            nn.init.normal_(tensor, std=head**-0.5, generator=generator)
            tensor.view(heads, -1)[:, -head:] = 0

        found: dict[Tensor, Initializer] = {self.start: start, self.norm_weight: constant(1.0)}
        return found | dict.fromkeys((self.norm_bias, self.extra_share), constant(0.0))

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = (l2norm(upcast(part)) * self.head**0.5 for part in (q, k))
        # Over K, the squared length of a key: a rate of 1 then cancels a token's error, but for the LayerNorm.
        rate = self.config.base_rate / self.head * torch.sigmoid(upcast(self.rate(x)))
        place = torch.arange(1, self.config.mini_batch + 1, dtype=self.extra_share.dtype, device=x.device)
        shares = (1 / place + self.extra_share).clamp(min=0)
        per_head = (self.shape.heads, -1, self.head)
        start, norm = self.start.view(per_head), (self.norm_weight, self.norm_bias)
        learned = start, *(part.view(self.shape.heads, self.head) for part in norm), shares
        out, after["memory"] = sequence.run(ttt_linear, q, k, v, rate, *learned, initial_state=past.get("memory"))
        return self.out(self.norm(out, self.gate(x)).to(x.dtype)), after
