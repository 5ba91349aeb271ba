"""Kimi Delta Attention (Kimi Linear, 2025, arXiv 2510.26692, section 3): the delta rule with a per-channel decay."""

import torch
from pydantic import NonNegativeInt, NonPositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, decay_rate, initialize, step_bias
from seqtrain.layers import Linear, LowRank, step_sizes, upcast
from seqtrain.mixers import LayerShape
from seqtrain.mixers.common.delta import DeltaMixer
from seqtrain.mixers.gated_delta_net import GatedDeltaRecurrence


class KDARecurrence(GatedDeltaRecurrence):
    """A decay for every key channel, from a matrix of full rank."""

    @property
    def decays(self) -> int:
        return self.heads.groups * self.heads.key

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        written = super().write(x, k, v)
        return written | {"log_decay": written["log_decay"].unflatten(2, (self.heads.groups, -1))}


class KDA(DeltaMixer):
    """Each key channel forgets by `a = exp(-A softplus(W2 W1 x + b))`; the output gate is a sigmoid of low rank."""

    recurrence = KDARecurrence
    gate_activation = "sigmoid"

    class Config(DeltaMixer.Config):
        # Rank of the two matrices that make the decay and the output gate; 0: the width of a value head.
        gate_rank: NonNegativeInt = 0
        # False: one matrix makes each of them, of full rank (Ling 3).
        low_rank: bool = True
        # Bound of the decay's logarithm, which then is this times sigmoid(A (W x + b)); 0: none (Ling 3 has -5).
        log_decay_bound: NonPositiveFloat = 0.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if self.all_key_heads != shape.all_heads:
            raise self.config_error("key_heads", config.key_heads, "each head has a decay of its own")
        rank, keys = config.gate_rank or self.value, shape.heads * self.key

        def projection(out: int) -> nn.Module:
            return LowRank(shape.width, rank, out) if config.low_rank else Linear(shape.width, out, bias=False)

        self.decay = projection(keys)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(keys))
        self.gate = projection(self.inner)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.rate_log: decay_rate(), self.step_bias: step_bias()}

    def log_decay(self, x: Tensor) -> Tensor:
        rate, heads = self.rate_log.exp()[:, None], (self.shape.heads, self.key)
        if bound := self.config.log_decay_bound:
            return bound * torch.sigmoid(rate * (upcast(self.decay(x)) + self.step_bias).unflatten(2, heads))
        return -rate * step_sizes(self.decay(x), self.step_bias).unflatten(2, heads)  # B T H K
