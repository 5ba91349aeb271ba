"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, section 3): the delta rule with Mamba-2's decay."""

from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, decay_rate, initialize, step_bias
from seqtrain.layers import Linear, step_sizes
from seqtrain.mixers import LayerShape
from seqtrain.mixers.common.delta import DeltaMixer, DeltaRecurrence
from seqtrain.mixers.common.recurrence import Heads, Recurrence, RecurrenceOptions, StepDecay
from seqtrain.mixers.common.take_over import forget_slowly


class GatedDeltaRecurrence(DeltaRecurrence):
    """The delta rule with Mamba-2's decay: `decays` numbers for all heads together."""

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.step = StepDecay(heads.width, heads.groups, self.decays, options)

    @property
    def decays(self) -> int:
        """How many numbers forget: one per key head."""
        return self.heads.groups

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return super().write(x, k, v) | {"log_decay": self.step(x)[0]}


class GatedDeltaNet(DeltaMixer):
    """Each head forgets by `a = exp(-A softplus(W x + b))`, one number per token; the output is gated by SiLU."""

    recurrence: ClassVar[type[Recurrence] | None] = GatedDeltaRecurrence

    # Of the paper's sizes, with which a layer has as many parameters as attention and its gate.
    class Config(DeltaMixer.Config):
        expand_key: PositiveFloat = 0.75
        expand_value: PositiveFloat = 1.5

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.decay = Linear(shape.width, shape.heads, bias=False)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(shape.heads))
        self.gate = Linear(shape.width, self.inner, bias=False)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        # From just above 0, where the authors' code starts at 0 and may draw a rate whose logarithm is -inf.
        return {self.rate_log: decay_rate(low=1e-3), self.step_bias: step_bias()}

    def init_from_attention(self, attention: Any) -> None:
        super().init_from_attention(attention)
        forget_slowly(self.rate_log)

    def log_decay(self, x: Tensor) -> Tensor:
        return -self.rate_log.exp() * step_sizes(self.decay(x), self.step_bias)
