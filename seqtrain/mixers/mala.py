"""MALA, magnitude-aware linear attention ("Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv 2507.00698).

Weights that are divided by their sum do not change when a query grows: its length cancels. MALA's do. With scores s,
phi = elu + 1, and z their mean over the tokens seen,

    s_tj = phi(q_t) . phi(k_j) / sqrt(K)
    weight_tj = (beta s_tj - gamma) / t        beta = 1 + 1 / z        gamma = z

which sums to 1 over j <= t, and spreads in proportion to the query's length. Here it is causal: means run over the
past, so that mean and count are a second, small state. It differs from the paper's by default in one thing: a short
convolution of q, k and v stands for positions, which `rope`, `lepe` and `conv_width=0` make the paper's.
"""

import torch
from torch import Tensor

from seqtrain.layers import Linear, elu, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import VisionLinearMixer, sums

# Below this a mean score is taken to be this: queries and keys of elu + 1 reach 0 only by underflow.
SMALLEST = 1e-6


class MALA(VisionLinearMixer):
    """`out_t = sum_j weight_tj v_j`, gated by a projection of the input as in the authors' code."""

    def __init__(self, config: VisionLinearMixer.Config, shape: LayerShape):
        super().__init__(config, shape)
        self.gate = Linear(shape.width, self.inner, bias=False)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        weighted, weight, memory = self.weigh(elu(q), elu(k), v, past, sequence)
        one = torch.ones_like(q[..., :1])
        total, count, after["mean"] = sums(one, one, v, past.get("mean"), sequence, scale=1.0)
        mean = (weight / count).clamp(min=SMALLEST)
        out = (weighted * (1 + 1 / mean) - mean * total) / count
        out, local = self.with_local(out, v, past, sequence)
        return self.out((out.flatten(2) * upcast(self.gate(x))).to(x.dtype)), after | memory | local
