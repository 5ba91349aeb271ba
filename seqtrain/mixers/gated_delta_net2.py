"""Gated DeltaNet-2 (GDN-2, 2026): a delta rule that erases and writes by gates of their own, one for each channel.

As in the released layer of flash-linear-attention (fla/layers/gdn2.py), with as many value heads as key heads.
"""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, decay_rate, initialize, step_bias
from seqtrain.kernels import delta_rule
from seqtrain.layers import HeadNorm, Linear, LowRank, l2norm, step_sizes, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import ProjectedMixer


class GatedDeltaNet2(ProjectedMixer):
    """`S_t = (I - k_t^T (b_t * k_t)) diag(a_t) S_{t-1} + k_t^T (w_t * v_t)` on convolved q, k, v of unit length (q, k).

    b erases by key channel, w writes by value channel, both sigmoids; b = w, the same in all channels, is KDA, whose
    decay and output gate it has.
    """

    class Config(ProjectedMixer.Config):
        # Rank of the two matrices that make the decay and the output gate; 0: the width of a value head.
        gate_rank: NonNegativeInt = 0
        # True: b in [0, 2], so that a state can change its sign (arXiv 2411.12537); False: in [0, 1].
        allow_negative_eigenvalues: bool = False
        # Added to the mean square in the norm of what heads read.
        norm_eps: PositiveFloat = 1e-6

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        rank, keys = config.gate_rank or self.value, shape.heads * self.key
        self.erase = Linear(shape.width, keys, bias=False)
        self.write = Linear(shape.width, self.inner, bias=False)
        self.decay = LowRank(shape.width, rank, keys)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(keys))
        self.gate = LowRank(shape.width, rank, self.inner, bias=True)
        self.norm = HeadNorm(self.value, "sigmoid", config.norm_eps)
        self.out = self.output(self.inner)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.rate_log: decay_rate(), self.step_bias: step_bias()}

    def activated(self) -> bool:
        return True

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = l2norm(q), l2norm(k)
        erase = (1 + self.config.allow_negative_eigenvalues) * torch.sigmoid(upcast(self.erase(x))).view_as(k)
        write = torch.sigmoid(upcast(self.write(x))).view_as(v)
        dt = step_sizes(self.decay(x), self.step_bias).view_as(k)
        log_decay = -self.rate_log.exp()[:, None] * dt  # B T H K
        # The gates say how much: beta is one.
        written = k, (write * v).to(v.dtype), torch.ones_like(dt[..., 0]), log_decay, (erase * k).to(k.dtype), k
        out, after["memory"] = sequence.run(delta_rule, q, *written, initial_state=past.get("memory"))
        return self.out(self.norm(out, self.gate(x))), after
