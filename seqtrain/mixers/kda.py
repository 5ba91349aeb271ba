"""Kimi Delta Attention (Kimi Linear, 2025, arXiv 2510.26692, section 3): the delta rule with a per-channel decay."""

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from seqtrain.layers import LowRank, reset_decay_rate, reset_step_bias, step_sizes
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

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if self.key_heads != shape.heads:
            raise self.config_error("key_heads", config.key_heads, "each head has a decay of its own")
        rank, keys = config.gate_rank or self.value, shape.heads * self.key
        self.decay = LowRank(shape.width, rank, keys)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(keys))
        self.gate = LowRank(shape.width, rank, self.inner)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_decay_rate(self.rate_log, generator)
        reset_step_bias(self.step_bias, generator)

    def log_decay(self, x: Tensor) -> Tensor:
        step = step_sizes(self.decay(x), self.step_bias).unflatten(2, (self.shape.heads, self.key))
        return -self.rate_log.exp()[:, None] * step  # B T H K
