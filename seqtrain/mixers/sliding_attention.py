"""Sliding-window softmax attention (Beltagy et al. 2020, arXiv 2004.05150): cost and state linear in the window."""

from pydantic import PositiveInt

from seqtrain.mixers import LayerShape
from seqtrain.mixers.common.attention import SoftmaxAttention


class SlidingAttention(SoftmaxAttention):
    """Every token sees itself and the `window - 1` tokens before it; the state is that many keys and values."""

    class Config(SoftmaxAttention.Config):
        # Tokens a query sees, its own included.
        window: PositiveInt = 512

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if config.kept_keys:
            raise self.config_error("kept_keys", config.kept_keys, "a window reads its keys alone; use 0")
        self.window = config.window
