"""Liger attention as published (arXiv 2503.01496): half a window, half a recurrence gated by keys, no new weights."""

import torch
from pydantic import PositiveInt
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import upcast
from seqtrain.mixers.common.base import Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import run_grouped
from seqtrain.mixers.sliding_attention import SlidingAttention

# The gates that the paper slows down are sigmoids to the power 1 / TEMPERATURE.
TEMPERATURE = 16.0


class Liger(SlidingAttention):
    """`0.5 * window(rotated q, k) + 0.5 * recurrence(q, k before the rotation)`; the recurrence sees every token.

    The gates are functions of the keys: the pooling the paper describes is the identity in its code, as a head has as
    many gates as key channels. Scale 1 and no normalizer, as there. A window counts a token's own key, as everywhere
    here; the released code's of 64 keys are those before it, which is `window=65` (3.5% of the output at T=130).
    """

    class Config(SlidingAttention.Config):
        window: PositiveInt = 64

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        near, kept = super().attention(q, k, v, place, past, sequence)
        far, memory = self.recur(q, k, v, past, sequence)
        # An ablated half counts nothing, and the other one what it counted.
        halves = {"window": near, "memory": far}
        kept_halves = [0.5 * half for name, half in halves.items() if name != self.without]
        return torch.stack(kept_halves).sum(0), kept | memory

    def recur(self, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
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
