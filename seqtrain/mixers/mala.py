"""MALA, magnitude-aware linear attention ("Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv 2507.00698).

Weights that are divided by their sum do not change when a query grows: its length cancels. MALA's do. With scores s,
phi = elu + 1, and z their mean over the tokens seen,

    s_tj = phi(q_t) . phi(k_j) / sqrt(K)
    weight_tj = (beta s_tj - gamma) / t        beta = 1 + 1 / z        gamma = z

which sums to 1 over j <= t, and spreads in proportion to the query's length. Here it is causal: means run over the
past, so that mean and count are a second, small state. A short convolution stands for the local positional encoding.
"""

import torch
from torch import Tensor, nn

from seqtrain.layers import elu, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearMixer, sums

# Below this a mean score is taken to be this: queries and keys of elu + 1 reach 0 only by underflow.
SMALLEST = 1e-6


class MALA(LinearMixer):
    """`out_t = sum_j weight_tj v_j`, gated by a projection of the input as in the authors' code."""

    def __init__(self, config: LinearMixer.Config, shape: LayerShape):
        super().__init__(config, shape)
        self.gate = nn.Linear(shape.width, self.inner, bias=False)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        weighted, weight, after["memory"] = sums(elu(q), elu(k), v, past.get("memory"), sequence)
        one = torch.ones_like(q[..., :1])
        total, count, after["mean"] = sums(one, one, v, past.get("mean"), sequence, scale=1.0)
        mean = (weight / count).clamp(min=SMALLEST)
        out = (weighted * (1 + 1 / mean) - mean * total) / count
        return self.out((out.flatten(2) * upcast(self.gate(x))).to(x.dtype)), after
