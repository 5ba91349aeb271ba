"""Sliding-window softmax attention (Beltagy et al. 2020, arXiv 2004.05150): cost and state linear in the window."""

from dataclasses import dataclass

from pydantic import PositiveInt

from seqtrain.mixers import LayerShape
from seqtrain.mixers.common.attention import AttentionConfig, SoftmaxAttention


class SlidingAttention(SoftmaxAttention):
    """Every token sees itself and the `window - 1` tokens before it; the state is that many keys and values."""

    @dataclass(frozen=True)
    class Config(AttentionConfig):
        # Tokens a query sees, its own included.
        window: PositiveInt = 512

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.window = config.window
