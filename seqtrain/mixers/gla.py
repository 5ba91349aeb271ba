"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4)."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from seqtrain.initialization import Initializer, constant
from seqtrain.kernels import linear_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, Linear, LowRank, log_forget
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import ProjectedMixer
from seqtrain.mixers.common.recurrence import Heads, LinearRecurrence, RecurrenceOptions


class TiedGLARecurrence(LinearRecurrence):
    """Every feature keeps what the key leaves: `a = 1 - phi(k)`, without a matrix (SpikingBrain, arXiv 2509.05276)."""

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        features = self.mapped(k, self.key_map)
        # A softmax of one channel far ahead rounds to 1, whose gate would have no logarithm.
        decay = torch.log1p(-features.clamp(max=1 - 2**-20))
        return {"k": features.to(v.dtype), "v": v, "log_decay": decay}


class GLARecurrence(LinearRecurrence):
    """Every feature forgets by `sigmoid(W2 W1 x + b) ** (1 / temperature)`."""

    tied = TiedGLARecurrence

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.forget = LowRank(heads.width, options.gate_rank, heads.groups * self.feature_count, bias=True)

    def initializers(self) -> dict[Tensor, Initializer]:
        return super().initializers() | {self.forget.offset: constant(self.options.gate_bias)}

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = log_forget(self.forget(x), self.options.temperature)
        return super().write(x, k, v) | {"log_decay": decay.unflatten(2, (self.heads.groups, -1))}


class GLA(ProjectedMixer):
    """Linear attention whose every key channel forgets as the token says: `a = sigmoid(W2 W1 x + b)^(1/16)`."""

    recurrence = GLARecurrence

    class Config(ProjectedMixer.Config):
        expand_key: PositiveFloat = 0.5
        conv_width: Annotated[int, Field(ge=0, le=16)] = 0
        # Rank of the matrix that makes the forget gate.
        gate_rank: PositiveInt = 16
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: PositiveFloat = 16.0
        # What queries and keys pass through: identity, relu or sigmoid (the smaller and the larger SpikingBrain's).
        feature_map: Literal["identity", "relu", "sigmoid"] = "identity"
        # False: normalised heads leave as they are, without a SiLU gate (SpikingBrain).
        output_gate: bool = True

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.forget = LowRank(shape.width, config.gate_rank, shape.heads * self.key, bias=True)
        self.gate = Linear(shape.width, self.inner, bias=False) if config.output_gate else None
        self.norm = HeadNorm(self.value)
        self.out = self.output(self.inner)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        feature_map, _ = FEATURE_MAPS[self.config.feature_map]
        q, k = feature_map(q), feature_map(k)
        log_decay = log_forget(self.forget(x), self.config.gate_temperature).unflatten(2, (self.shape.heads, self.key))
        out, after["memory"] = sequence.run(linear_attention, q, k, v, log_decay, initial_state=past.get("memory"))
        return self.out(self.norm(out, None if self.gate is None else self.gate(x))), after
