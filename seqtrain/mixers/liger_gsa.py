"""Liger with gated slot attention's recurrence (arXiv 2503.01496), as many slots as key channels."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from seqtrain.layers import upcast
from seqtrain.mixers._base import State
from seqtrain.mixers._liger import Liger, LigerConfig, slow_gate
from seqtrain.mixers._slots import slot_attention, slot_flops, slot_shapes
from seqtrain.parallel.sequence import SequenceContext


class LigerGSA(Liger):
    """Slot m keeps `sigmoid(k_t[m])^(1/16)` of what it holds and takes the rest from the token."""

    @dataclass(frozen=True)
    class Config(LigerConfig):
        pass

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        written = {"k": k, "v": v, "log_decay": slow_gate(upcast(k))}
        return slot_attention(q, written, past, sequence, scale=1.0)

    def recurrent_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return slot_shapes(batch, self.groups, self.key, self.key, self.key)

    def recurrent_flops(self, tokens: int) -> int:
        return slot_flops(tokens, self.shape.heads, self.key, self.key, self.key)
