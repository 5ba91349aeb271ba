"""MALA, magnitude-aware linear attention ("Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv 2507.00698).

Weights that are divided by their sum do not change when a query grows: its length cancels. MALA's do. With scores s,
phi = elu + 1, and z their mean over the tokens seen,

    s_tj = phi(q_t) . phi(k_j) / sqrt(K)
    weight_tj = (beta s_tj - gamma) / t        beta = 1 + 1 / z        gamma = z

which sums to 1 over j <= t, and spreads in proportion to the query's length. Here it is causal: means run over the
past, so that mean and count are a second, small state. A short convolution stands for the paper's local positional
encoding, and there is no rotation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqtrain.layers import elu, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearConfig, LinearMixer, sums

# Below this a mean score is taken to be this: queries and keys of elu + 1 reach 0 only by underflow.
SMALLEST = 1e-6


def magnitude_aware_weights(q: Tensor, k: Tensor) -> Tensor:
    """The weights themselves, `[B,H,T,T]`, zero after the token; for study, since there are T squared.

    `q, k`: `[B,T,H,K]` before the feature map. Rows sum to 1; entries may be negative.
    """
    q, k = (elu(upcast(x)).transpose(1, 2) for x in (q, k))  # B H T K
    score = (q @ k.mT * q.shape[-1] ** -0.5).tril()
    count = torch.arange(1, score.shape[-1] + 1, device=q.device)[:, None]
    mean = (score.sum(-1, keepdim=True) / count).clamp(min=SMALLEST)
    return ((score * (1 + 1 / mean) - mean) / count).tril()


class MALA(LinearMixer):
    """`out_t = sum_j weight_tj v_j`, gated by a projection of the input as in the authors' code."""

    @dataclass(frozen=True)
    class Config(LinearConfig):
        pass

    def __init__(self, config: Config, shape: LayerShape):
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
