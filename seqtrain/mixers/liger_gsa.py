"""Liger with gated slot attention's recurrence (arXiv 2503.01496), as many slots as key channels."""

from torch import Tensor

from seqtrain.layers import log_forget
from seqtrain.mixers import Past, SequenceContext, State
from seqtrain.mixers.common.liger import TEMPERATURE, Liger
from seqtrain.mixers.common.recurrence import slot_attention


class LigerGSA(Liger):
    """Slot m keeps `sigmoid(k_t[m])^(1/16)` of what it holds and takes the rest from the token."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        written = {"k": k, "v": v, "log_decay": log_forget(k, TEMPERATURE)}
        return slot_attention(q, written, past, sequence, scale=1.0)
