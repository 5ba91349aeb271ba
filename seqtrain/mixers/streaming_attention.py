"""Softmax attention over a sliding window and a document's first tokens (StreamingLLM, arXiv 2309.17453).

The first tokens, which a pretrained model's heads look at when they look at nothing, stay in sight for ever.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from seqtrain.kernels import sink_attention
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.attention import AttentionConfig, SoftmaxAttention, attend


class StreamingAttention(SoftmaxAttention):
    """Every token sees itself, the `window - 1` tokens before it, and the first `sinks` tokens of its document."""

    @dataclass(frozen=True)
    class Config(AttentionConfig):
        # Tokens a query sees, its own included.
        window: PositiveInt = 512
        # First tokens of a document that stay in sight.
        sinks: NonNegativeInt = 4

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.window = config.window
        # What an ablation leaves out: the window, which is all there is, or nothing.
        self.without: Literal["", "window"] = ""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        window, sinks = self.config.window, self.config.sinks
        out, after = attend(sequence, sink_attention, q, k, v, past=past, window=window, sinks=sinks)
        return torch.zeros_like(out) if self.without else out, after
