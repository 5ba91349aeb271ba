"""Softmax attention over a sliding window and a document's first tokens (StreamingLLM, arXiv 2309.17453).

The first tokens, which a pretrained model's heads look at when they look at nothing, stay in sight for ever.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.kernels import sink_attention
from seqtrain.layers import positions
from seqtrain.mixers._attention import AttentionConfig, SoftmaxAttention
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, State
from seqtrain.mixers._costs import softmax_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class StreamingAttention(SoftmaxAttention):
    """Every token sees itself, the `window - 1` tokens before it, and the first `sinks` tokens of its document."""

    @dataclass(frozen=True)
    class Config(AttentionConfig):
        # Tokens a query sees, its own included.
        window: Annotated[int, Field(gt=0)] = 512
        # First tokens of a document that stay in sight.
        sinks: Annotated[int, Field(ge=0)] = 4

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.window = config.window
        # What an ablation leaves out: the window, which is all there is, or nothing.
        self.without: Literal["", "window"] = ""

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        past = dict(state or EMPTY)
        place, position = positions(x, past.pop("position", None), sequence)
        out, after = sequence.run(
            sink_attention,
            self.rotated(q, place),
            self.rotated(k, place),
            v,
            window=self.config.window,
            sinks=self.config.sinks,
            initial_state=past or None,
        )
        if self.without:
            out = torch.zeros_like(out)
        return self.out(out.flatten(2)), after | {"position": position}

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        sinks = (batch, self.config.sinks, self.groups, self.key)
        return super().state_shapes(batch, tokens) | {"sink_k": sinks, "sink_v": sinks}

    def operator_flops(self, tokens: int) -> int:
        seen = self.config.window + self.config.sinks
        return softmax_attention_flops(tokens, self.shape.heads, self.key, self.key, seen)
