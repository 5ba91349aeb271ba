"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4)."""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadNorm, HeadProjections, LowRank, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class GLA(Mixer):
    """Linear attention whose every key channel forgets as the token says: `a = sigmoid(W2 W1 x + b)^(1/16)`."""

    @dataclass(frozen=True)
    class Config:
        # Key channels over model.width, all heads together.
        expand_key: Annotated[float, Field(gt=0)] = 0.5
        # Value channels over model.width, all heads together.
        expand_value: Annotated[float, Field(gt=0)] = 1.0
        # Rank of the matrix that makes the forget gate.
        gate_rank: Annotated[int, Field(gt=0)] = 16
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: Annotated[float, Field(gt=0)] = 16.0
        # Tokens under the short convolution of q, k and v; 0: none.
        conv_width: Annotated[int, Field(ge=0, le=16)] = 0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        widths = (self.key, self.key, self.value)
        self.qkv = HeadProjections(shape.width, shape.heads, widths, conv_width=config.conv_width)
        self.forget = LowRank(shape.width, config.gate_rank, shape.heads * self.key, bias=True)
        self.gate = nn.Linear(shape.width, shape.heads * self.value, bias=False)
        self.norm = HeadNorm(self.value)
        self.out = nn.Linear(shape.heads * self.value, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        log_decay = F.logsigmoid(upcast(self.forget(x))) / self.config.gate_temperature
        log_decay = log_decay.unflatten(2, (self.shape.heads, self.key))  # B T H K
        out, after["memory"] = sequence.run(linear_attention, q, k, v, log_decay, initial_state=past.get("memory"))
        return self.out(self.norm(out, self.gate(x))), after

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.heads, self.key, self.value), **self.qkv.state_shapes(batch)}

    def weights(self) -> tuple[int, int]:
        matrices, others = self.qkv.weights()
        width, inner, keys = self.shape.width, self.shape.heads * self.value, self.shape.heads * self.key
        return matrices + 2 * inner * width + self.config.gate_rank * (width + keys), others + keys + self.value

    def operator_flops(self, tokens: int) -> int:
        return linear_attention_flops(tokens, self.shape.heads, self.key, self.value) + self.qkv.flops(tokens)
