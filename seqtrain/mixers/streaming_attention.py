"""Softmax attention over a sliding window and a document's first tokens (StreamingLLM, arXiv 2309.17453).

The first tokens, which a pretrained model's heads look at when they look at nothing, stay in sight for ever.
"""

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from seqtrain.kernels import sink_attention
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.attention import LearnedSinks, attend
from seqtrain.mixers.sliding_attention import SlidingAttention


class StreamingAttention(SlidingAttention):
    """Every token sees itself, the `window - 1` tokens before it, and the first `sinks` tokens of its document."""

    class Config(SlidingAttention.Config):
        # First tokens of a document that stay in sight.
        sinks: NonNegativeInt = 4
        # Learned keys and values that every query sees besides (SpikingBrain, arXiv 2509.05276).
        learned_sinks: NonNegativeInt = 0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.learned = None
        if config.learned_sinks:
            # A key head's sinks aren't divided.
            shape.share(self.all_groups, f"{self.all_groups} key heads with learned sinks")
            self.learned = LearnedSinks(config.learned_sinks, self.groups, self.key)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        q, k = self.rotated(q, place), self.rotated(k, place)
        window, sinks = self.config.window, self.config.sinks
        scale = self.config.scale or self.key**-0.5
        extra = () if self.learned is None else self.learned(q, scale)
        options = {"window": window, "sinks": sinks, "scale": scale}
        out, after = attend(sequence, sink_attention, q, k, v, *extra, past=past, **options)
        return torch.zeros_like(out) if self.without else out, after
