"""Liger attention as published (arXiv 2503.01496): half a window, half a recurrence gated by keys, no new weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.layers import positions, upcast
from seqtrain.mixers._attention import AttentionConfig, SoftmaxAttention
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, State
from seqtrain.mixers._costs import linear_attention_flops, softmax_attention_flops
from seqtrain.mixers._slots import run_grouped
from seqtrain.parallel.sequence import SequenceContext


@dataclass(frozen=True)
class LigerConfig(AttentionConfig):
    """The fields every mixer of this family has."""

    # Tokens under the softmax, the query's own included.
    window: Annotated[int, Field(gt=0)] = 64


class Liger(SoftmaxAttention):
    """`0.5 * window(rotated q, k) + 0.5 * recurrence(q, k before the rotation)`; the recurrence sees every token.

    The gates are functions of the keys: the pooling the paper describes is the identity in its code, as a head has as
    many gates as key channels. Scale 1 and no normaliser, as there.
    """

    Config: ClassVar[type] = LigerConfig
    config: LigerConfig

    def __init__(self, config: LigerConfig, shape: LayerShape):
        super().__init__(config, shape)
        self.window = config.window
        # What an ablation leaves out: a part's name, or nothing.
        self.without: Literal["", "memory", "window"] = ""

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        q, k, v = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        held = {key: past[key] for key in ("k", "v", "length") if key in past}
        near, kept = sequence.run(
            softmax_attention,
            self.rotated(q, place),
            self.rotated(k, place),
            v,
            window=self.window,
            initial_state=held or None,
        )
        far, memory = self.recur(q, k, v, past, sequence)
        # An ablated half counts nothing, and the other one what it counted.
        halves = {"window": near, "memory": far}
        kept_halves = [0.5 * half for name, half in halves.items() if name != self.without]
        out = torch.stack(kept_halves).sum(0)
        return self.out(out.to(x.dtype).flatten(2)), kept | memory | {"position": position}

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        """`q: [B,T,H,K]`, `k, v: [B,T,G,K]` -> `[B,T,H,K]` and the state: `S_t = diag(a_t) S_{t-1} + key_t^T v_t`."""
        key, decay = self.gated(upcast(k))
        query = upcast(q).softmax(-1).to(v.dtype)
        out, memory = run_grouped(
            sequence, linear_attention, query, key.to(v.dtype), v, decay, scale=1.0, past=past.get("memory")
        )
        return out, {"memory": memory}

    def gated(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """What is written, and the logarithm of what is kept, both `[B,T,G,K]`."""
        raise NotImplementedError

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return super().state_shapes(batch, tokens) | self.recurrent_shapes(batch)

    def recurrent_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of the recurrence's states."""
        return {"memory": (batch, self.groups, self.key, self.key)}

    def operator_flops(self, tokens: int) -> int:
        window = softmax_attention_flops(tokens, self.shape.heads, self.key, self.key, self.config.window)
        return window + self.recurrent_flops(tokens)

    def recurrent_flops(self, tokens: int) -> int:
        """Of the recurrence over one sequence."""
        return linear_attention_flops(tokens, self.shape.heads, self.key, self.key)


def slow_gate(k: Tensor) -> Tensor:
    """`log sigmoid(k) ** (1/16)`."""
    return F.logsigmoid(k) / 16


def complement(decay: Tensor) -> Tensor:
    """`1 - exp(decay)`, without cancellation."""
    return -torch.expm1(decay)
