"""Softmax attention over a sliding window and a document's first tokens (StreamingLLM, arXiv 2309.17453).

The first tokens, which a pretrained model's heads look at when they look at nothing, stay in sight for ever.
"""

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from seqtrain.kernels import sink_attention
from seqtrain.mixers import Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend
from seqtrain.mixers.sliding_attention import SlidingAttention


class StreamingAttention(SlidingAttention):
    """Every token sees itself, the `window - 1` tokens before it, and the first `sinks` tokens of its document."""

    class Config(SlidingAttention.Config):
        # First tokens of a document that stay in sight.
        sinks: NonNegativeInt = 4

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        q, k = self.rotated(q, place), self.rotated(k, place)
        window, sinks = self.config.window, self.config.sinks
        out, after = attend(sequence, sink_attention, q, k, v, past=past, window=window, sinks=sinks)
        return torch.zeros_like(out) if self.without else out, after
