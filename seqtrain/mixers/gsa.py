"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, section 3): a softmax over slots that forget."""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from seqtrain.initialization import Initializer, computed
from seqtrain.layers import HeadProjections, Linear, RMSNorm, log_forget
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import Heads, Reading, Recurrence, RecurrenceOptions, slot_attention


class SlotRecurrence(Recurrence):
    """Slots of keys and of values that a softmax reads, each forgetting as it is written."""

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.forget = Linear(heads.width, heads.groups * options.slots)

    def initializers(self) -> dict[Tensor, Initializer]:
        # From slots that turn over in 23 tokens to some that take 600: slow ones alone would stay empty for long.
        slowest = self.options.gate_bias + 0.6
        slots, groups = self.options.slots, self.heads.groups
        rates = computed(lambda: torch.linspace(0.0, slowest, slots).repeat(groups))
        return super().initializers() | {self.forget.bias: rates}

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = log_forget(self.forget(x), self.options.temperature)
        return {"k": k, "v": v, "log_decay": decay.unflatten(2, (self.heads.groups, -1))}

    def read(self, q: Tensor, written: Past, past: Past, sequence: SequenceContext) -> Reading:
        out, after = slot_attention(q, written, past, sequence, scale=self.heads.key**-0.5)
        return out, None, after


class GSA(Mixer):
    """Each slot keeps `a = sigmoid(W x)^(1/temperature)` and takes `1 - a` of key and value; read by softmax."""

    recurrence = SlotRecurrence

    class Config(MixerConfig):
        # Key channels over model.width, all heads together.
        expand_key: PositiveFloat = 1.0
        # Value channels over model.width, all heads together.
        expand_value: PositiveFloat = 1.0
        # Slots per head.
        slots: PositiveInt = 64
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: PositiveFloat = 8.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        inner = shape.heads * self.value
        self.parts = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value, config.slots))
        self.norm = RMSNorm(inner, tensor=shape.tensor)
        self.out = self.output(inner)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v, forget), _ = self.parts(x, None, sequence)
        decay = log_forget(forget, self.config.gate_temperature)  # B T H M
        written = {"k": F.silu(k), "v": F.silu(v), "log_decay": decay}
        out, after = slot_attention(F.silu(q), written, past, sequence, scale=1.0)
        return self.out(self.norm(F.silu(out.flatten(2)))), after
