"""Kimi Delta Attention (Kimi Linear, 2025, arXiv 2510.26692, section 3): the delta rule with a decay a channel."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.layers import LowRank, reset_decay_rate, reset_step_bias, step_sizes
from seqtrain.mixers._base import LayerShape
from seqtrain.mixers._delta import DeltaConfig, DeltaMixer


class KDA(DeltaMixer):
    """Each key channel forgets by `a = exp(-A softplus(W2 W1 x + b))`; the output gate is a sigmoid of low rank."""

    @dataclass(frozen=True)
    class Config(DeltaConfig):
        # Rank of the two matrices that make the decay and the output gate; 0: the width of a value head.
        gate_rank: Annotated[int, Field(ge=0)] = 0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.rank = config.gate_rank or self.value
        self.keys = shape.heads * self.key
        self.decay = LowRank(shape.width, self.rank, self.keys)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(self.keys))
        self.gate = LowRank(shape.width, self.rank, self.inner)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_decay_rate(self.rate_log, generator)
        reset_step_bias(self.step_bias, generator)

    def log_decay(self, x: Tensor) -> Tensor:
        step = step_sizes(self.decay(x), self.step_bias).unflatten(2, (self.shape.heads, self.key))
        return -self.rate_log.exp()[:, None] * step  # B T H K

    def output_gate(self, x: Tensor) -> Tensor:
        return self.gate(x)

    @staticmethod
    def gate_activation() -> Literal["silu", "sigmoid"]:
        return "sigmoid"

    def weights(self) -> tuple[int, int]:
        matrices, others = super().weights()
        low_rank = self.rank * (2 * self.shape.width + self.keys + self.inner)
        return matrices + low_rank, others + self.shape.heads + self.keys
