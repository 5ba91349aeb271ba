"""RWKV-6 ("Eagle and Finch: RWKV with Matrix-Valued States", 2024, arXiv 2404.05892, section 4)."""

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, initialize
from seqtrain.kernels import linear_attention
from seqtrain.layers import Linear, LowRank, token_shift, upcast
from seqtrain.mixers import LayerShape, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.rwkv import RWKVMixer, blends, depth_ratios, ramp

# Of this the exponential is a float32 number yet; a log decay must be finite.
LARGEST = 88.0


class RWKV6(RWKVMixer):
    """`S_t = diag(w_t) S_{t-1} + k_t^T v_t`, `o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)`: a bonus u for the token itself.

    `w = exp(-exp(d))`, d of low rank in the input. How far each of r, w, k, v and the gate blends a token with the one
    before depends on both (the paper's data-dependent lerp). The output reads the state before its own token, so keys,
    values and decays go into the operator one token late.
    """

    class Config(MixerConfig):
        # Rank of the matrices that make each of the five blends.
        mix_rank: PositiveInt = 32
        # Rank of the matrices that make the decay.
        decay_rank: PositiveInt = 64

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        width = shape.width
        self.blend = nn.ModuleList(LowRank(width, config.mix_rank, width, activation=nn.Tanh()) for _ in range(5))
        self.gate = Linear(width, shape.channels, bias=False)
        self.decay = LowRank(width, config.decay_rank, shape.channels, bias=True, activation=nn.Tanh())
        self.first_mix = nn.Parameter(torch.empty(width))
        self.mixes = nn.Parameter(torch.empty(5 * width))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """The authors' initial values: blends, decays and bonuses that differ by channel and with depth."""
        rising, falling = depth_ratios(self.shape)
        place = ramp(self.shape.width)
        blends = tuple(zip((0.5, 1, 1, 1, 0.5), (0, 0, 0, 0.3, 0), strict=True))
        channel = torch.arange(1, self.shape.width + 1, device="cpu")
        return {
            self.first_mix: computed(lambda: 1 - place**falling),
            self.mixes: computed(
                lambda: torch.cat([1 - place ** (power * falling) - lift * rising for power, lift in blends])
            ),
            self.decay.offset: computed(lambda: -6 + 5 * place ** (0.7 + 1.3 * rising)),
            self.bonus: computed(lambda: rising * (1 - place) + 0.1 * (channel % 3 - 1)),
        }

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        after: State = {}
        before, after["shift"] = token_shift(x, past.get("shift"), sequence)
        difference = before - x
        (first,) = blends(x, difference, self.first_mix)
        for_r, for_decay, for_k, for_v, for_gate = (
            blend + difference * part(first)
            for blend, part in zip(blends(x, difference, self.mixes), self.blend, strict=True)
        )
        r, k, v = self.to_heads(self.r(for_r)), upcast(self.k(for_k)), upcast(self.v(for_v))
        log_decay = -upcast(self.decay(for_decay)).clamp(max=LARGEST).exp()
        late, after["written"] = token_shift(torch.cat([k, v, log_decay], 2), past.get("written"), sequence)
        late_k, late_v, late_decay = (self.to_heads(part) for part in late.chunk(3, 2))
        out, after["memory"] = sequence.run(
            linear_attention, r, late_k, late_v, late_decay, scale=1.0, initial_state=past.get("memory")
        )
        out = out + (r * self.to_heads(k * self.bonus)).sum(-1, keepdim=True) * self.to_heads(v)
        out = self.norm(out) * F.silu(upcast(self.gate(for_gate)))
        return self.out(out.to(x.dtype)), after
