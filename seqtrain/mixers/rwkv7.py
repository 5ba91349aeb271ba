"""RWKV-7 ("Goose" with Expressive Dynamic State Evolution, 2025, arXiv 2503.14456, section 4)."""

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, constant, initialize
from seqtrain.kernels import delta_rule
from seqtrain.layers import LowRank, l2norm, token_shift, upcast
from seqtrain.mixers import LayerShape, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.rwkv import RWKVMixer, blends, depth_ratios, ramp

# The decay of a channel is exp(-STRONGEST * sigmoid(...)): at least 0.545 per token.
STRONGEST = math.exp(-0.5)


class RWKV7(RWKVMixer):
    """A delta rule that is asked with one vector, erases along another and writes along a third.

    `S_t = (diag(w_t) - (a_t * c_t)^T c_t) S_{t-1} + k_t^T v_t`, with c of unit length, a decay w and a rate a for each
    channel; `o_t = r_t S_t + (r_t . (u * k_t)) v_t`. Six blends of each token with the one before make r, w, k, v, a
    and the gate. The paper mixes each layer's values with the first layer's; here a layer knows no other.
    """

    class Config(MixerConfig):
        # Rank of the matrices that make the decay.
        decay_rank: PositiveInt = 64
        # Rank of the matrices that make the rate, how much of what is found under c is erased.
        rate_rank: PositiveInt = 64
        # Rank of the matrices that make the output gate.
        gate_rank: PositiveInt = 128

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        width, inner = shape.width, shape.channels
        self.decay = LowRank(width, config.decay_rank, inner, bias=True, activation=nn.Tanh())
        self.rate = LowRank(width, config.rate_rank, inner, bias=True)
        self.gate = LowRank(width, config.gate_rank, inner, activation=nn.Sigmoid())
        self.mixes = nn.Parameter(torch.empty(6 * width))
        self.removal_scale = nn.Parameter(torch.empty(inner))
        self.rate_weight = nn.Parameter(torch.empty(inner))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """The authors' initial values: blends, decays and rates that differ from channel to channel and with depth."""
        rising, falling = depth_ratios(self.shape)
        place = ramp(self.shape.width)
        zigzag = 2 * ramp(self.head).repeat(self.shape.heads) - 1
        zigzag = zigzag * zigzag.abs()
        powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        return {
            self.mixes: computed(lambda: torch.cat([1 - place ** (power * falling) for power in powers])),
            self.decay.offset: computed(lambda: -5.5 + 6 * place ** (1 + rising**0.3) + 2.5 * zigzag),
            self.rate.offset: computed(lambda: -0.19 + 0.3 * zigzag + 0.4 * (place - 0.5)),
            self.removal_scale: computed(lambda: 0.71 - 0.1 * (place - 0.5)),
            self.rate_weight: constant(1.02),
            self.bonus: constant(-0.04),
        }

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        after: State = {}
        before, after["shift"] = token_shift(x, past.get("shift"), sequence)
        for_r, for_decay, for_k, for_v, for_rate, for_gate = blends(x, before - x, self.mixes)
        r, v = self.to_heads(self.r(for_r)), self.to_heads(self.v(for_v))
        log_decay = self.to_heads(-STRONGEST * torch.sigmoid(upcast(self.decay(for_decay))))
        rate = torch.sigmoid(upcast(self.rate(for_rate)))
        raw = upcast(self.k(for_k))
        removal = l2norm(self.to_heads(raw * self.removal_scale))
        k = self.to_heads(raw * (1 + (rate - 1) * self.rate_weight))
        beta = torch.ones_like(rate[..., : self.shape.heads])
        # The operator asks the decayed state, RWKV-7 the one before; a decay of 0.545 or more may be divided by.
        low_rank = removal * torch.exp(-log_decay), removal * self.to_heads(rate)
        out, after["memory"] = sequence.run(
            delta_rule, r, k, v, beta, log_decay, *low_rank, scale=1.0, initial_state=past.get("memory")
        )
        own = (r * k * self.to_heads(self.bonus)).sum(-1, keepdim=True) * v
        out = (self.norm(out) + own.flatten(2)) * self.gate(for_gate)
        return self.out(out.to(x.dtype)), after
