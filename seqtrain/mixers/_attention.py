"""Softmax attention with grouped heads and rotary positions: what the full and the windowed mixer share."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import softmax_attention
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import softmax_attention_flops
from seqtrain.mixers._parts import RMSNorm
from seqtrain.mixers._rotary import positions, rotate
from seqtrain.parallel.sequence import Sequence


@dataclass(frozen=True)
class AttentionConfig:
    """The fields both mixers have."""

    # Query heads that share one key and value head (grouped-query attention); must divide model.heads. 1: none share.
    query_group: Annotated[int, Field(gt=0)] = 1
    # Base of the rotation's wavelengths, in tokens.
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    # True: queries and keys are normalised by their root mean square, a head at a time, before the rotation.
    qk_norm: bool = False


class SoftmaxAttention(Mixer):
    """`out_t = sum_s softmax(q_t k_s / sqrt(K)) v_s` over past tokens, rotated by position (RoPE)."""

    Config: ClassVar[type] = AttentionConfig
    state_dtypes: ClassVar = {"length": torch.int64, "position": torch.int64}
    config: AttentionConfig
    # Keys a query sees, its own included; None for all.
    window: int | None = None

    def __init__(self, config: AttentionConfig, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width()
        if self.key % 2:
            rule = f"model.width/model.heads={self.key} must be even for the rotation of positions"
            raise self.config_error("rope_base", config.rope_base, rule)
        if shape.heads % config.query_group:
            raise self.config_error("query_group", config.query_group, f"must divide model.heads={shape.heads}")
        self.groups = shape.heads // config.query_group
        self.channels = [shape.width, self.groups * self.key, self.groups * self.key]
        self.qkv = nn.Linear(shape.width, sum(self.channels), bias=False)
        self.q_norm = RMSNorm(self.key) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.key) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, state: State | None = None, *, sequence: Sequence = WHOLE) -> tuple[Tensor, State]:
        q, k, v = (part.unflatten(2, (-1, self.key)) for part in self.qkv(x).split(self.channels, 2))  # B T H|G K
        past = dict(state or EMPTY)
        place, position = positions(x, past.pop("position", None), sequence)
        q = rotate(self.q_norm(q), place, self.config.rope_base)
        k = rotate(self.k_norm(k), place, self.config.rope_base)
        out, after = sequence.run(softmax_attention, q, k, v, window=self.window, initial_state=past or None)
        return self.out(out.flatten(2)), after | {"position": position}

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        kept = tokens if self.window is None else self.window - 1
        rows = (batch, kept, self.groups, self.key)
        return {"k": rows, "v": rows, "length": (batch,), "position": (batch,)}

    def weights(self) -> tuple[int, int]:
        width = self.shape.width
        return width * (sum(self.channels) + width), 2 * self.key if self.config.qk_norm else 0

    def operator_flops(self, tokens: int) -> int:
        window = tokens if self.window is None else self.window
        return softmax_attention_flops(tokens, self.shape.heads, self.key, self.key, window)
