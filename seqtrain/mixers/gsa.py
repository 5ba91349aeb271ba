"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, section 3): a softmax over slots that forget."""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.layers import HeadProjections, RMSNorm, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._slots import slot_attention, slot_flops, slot_shapes
from seqtrain.parallel.sequence import SequenceContext


class GSA(Mixer):
    """Each slot keeps `a = sigmoid(W x)^(1/temperature)` and takes `1 - a` of key and value; read by softmax."""

    @dataclass(frozen=True)
    class Config:
        # Key channels over model.width, all heads together.
        expand_key: Annotated[float, Field(gt=0)] = 1.0
        # Value channels over model.width, all heads together.
        expand_value: Annotated[float, Field(gt=0)] = 1.0
        # Slots of a head.
        slots: Annotated[int, Field(gt=0)] = 64
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: Annotated[float, Field(gt=0)] = 8.0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        self.inner = shape.heads * self.value
        self.parts = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value, config.slots))
        self.norm = RMSNorm(self.inner)
        self.out = nn.Linear(self.inner, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        (q, k, v, forget), _ = self.parts(x, None, sequence)
        decay = F.logsigmoid(upcast(forget)) / self.config.gate_temperature  # B T H M
        written = {"k": F.silu(k), "v": F.silu(v), "log_decay": decay}
        out, after = slot_attention(F.silu(q), written, state or EMPTY, sequence, scale=1.0)
        return self.out(self.norm(F.silu(out.flatten(2)))), after

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return slot_shapes(batch, self.shape.heads, self.config.slots, self.key, self.value)

    def weights(self) -> tuple[int, int]:
        return self.parts.weights()[0] + self.inner * self.shape.width, self.inner

    def operator_flops(self, tokens: int) -> int:
        return slot_flops(tokens, self.shape.heads, self.config.slots, self.key, self.value)
