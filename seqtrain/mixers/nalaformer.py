"""NaLaFormer, norm-aware linear attention (2025, arXiv 2506.21137; "Norm x Direction", ICML 2026).

The direction of a query is raised, channel by channel, to a power that grows with its length, so that a long query is
spiky and a short one flat, as under softmax; keys to a fixed one. Each channel becomes two, its positive and its
negative part: channels of opposite sign add nothing, and no weight is negative.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.layers import HeadNorm, l2norm, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearMixer, sums


def query_features(q: Tensor, power: float) -> Tensor:
    """`relu(+-d) ** (power * (1/2 + tanh |q|))` with `d = q / |q|`: `[...,K]` -> `[...,2K]`, in float32 at least."""
    q = upcast(q)
    length = (q.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return _signed_parts(l2norm(q)) ** (power * (0.5 + torch.tanh(length)))


def key_features(k: Tensor, power: float) -> Tensor:
    """`relu(+-k) ** power`, the length with the direction: `[...,K]` -> `[...,2K]`, in float32 at least."""
    return _signed_parts(upcast(k)) ** power


def _signed_parts(x: Tensor) -> Tensor:
    return F.relu(torch.cat([x, -x], -1))


class NaLaFormer(LinearMixer):
    """`out_t = sum_j s_tj v_j / sum_j s_tj`, `s_tj = phi_q(q_t) . phi_k(k_j)`; each head normalised, gated by SiLU.

    Causal, where the paper's layer sees all tokens of an image; a short convolution stands for its positional encoding.
    """

    class Config(LinearMixer.Config):
        # Power of keys; that of queries goes from a half of it (no length) to one and a half of it (great length).
        power: Annotated[float, Field(ge=2, le=8)] = 3.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.gate = nn.Linear(shape.width, self.inner, bias=False)
        self.norm = HeadNorm(self.value)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = query_features(q, self.config.power), key_features(k, self.config.power)
        weighted, weight, after["memory"] = sums(q, k, v, past.get("memory"), sequence, scale=1.0)
        # No weight at all only where no channel of a query meets one of its own sign: then the numerator is 0, too.
        out = weighted / weight.clamp(min=1e-12)
        return self.out(self.norm(out, self.gate(x)).to(x.dtype)), after
