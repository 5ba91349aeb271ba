"""Liger attention as published (arXiv 2503.01496): half a window, half a recurrence gated by keys, no new weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import positions, upcast
from seqtrain.mixers.common.attention import AttentionConfig, SoftmaxAttention
from seqtrain.mixers.common.base import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import run_grouped

# The gates that the paper slows down are sigmoids to the power 1 / TEMPERATURE.
TEMPERATURE = 16.0


@dataclass(frozen=True)
class LigerConfig(AttentionConfig):
    """The fields every mixer of this family has."""

    # Tokens under the softmax, the query's own included.
    window: PositiveInt = 64


class Liger(SoftmaxAttention):
    """`0.5 * window(rotated q, k) + 0.5 * recurrence(q, k before the rotation)`; the recurrence sees every token.

    The gates are functions of the keys: the pooling the paper describes is the identity in its code, as a head has as
    many gates as key channels. Scale 1 and no normalizer, as there.
    """

    Config: ClassVar[type] = LigerConfig
    config: LigerConfig

    def __init__(self, config: LigerConfig, shape: LayerShape):
        super().__init__(config, shape)
        self.window = config.window
        # What an ablation leaves out: a part's name, or nothing.
        self.without: Literal["", "memory", "window"] = ""

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        near, kept = self.attention(self.rotated(q, place), self.rotated(k, place), v, past, sequence)
        far, memory = self.recur(q, k, v, past, sequence)
        # An ablated half counts nothing, and the other one what it counted.
        halves = {"window": near, "memory": far}
        kept_halves = [0.5 * half for name, half in halves.items() if name != self.without]
        out = torch.stack(kept_halves).sum(0)
        return self.out(out.to(x.dtype).flatten(2)), kept | memory | {"position": position}

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
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
