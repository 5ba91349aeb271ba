"""Based ("Simple linear attention language models balance the recall-throughput tradeoff", 2024, arXiv 2402.18668)."""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import softmax_attention
from seqtrain.layers import taylor2
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend
from seqtrain.mixers.common.linear import LinearMixer, sums


class Based(LinearMixer):
    """Softmax over a short window, and its second-order Taylor polynomial over all of the past.

    Both weigh the same values by the same scores `s = q . k / sqrt(K)`: exp(s) near by, where precision counts, and
    `1 + s + s^2 / 2` everywhere, in a state of constant size. Each head learns how much of either it takes. The paper
    has layers of one kind and of the other: `window: 0` here, with `model.layers=[based, sliding_attention]`.
    """

    class Config(LinearMixer.Config):
        # Key channels over model.width, all heads together; K per head make about K^2/2 features: keep it small.
        expand_key: PositiveFloat = 0.25
        # Tokens under the softmax, a token's own included; 0: none, the Taylor polynomial alone.
        window: NonNegativeInt = 64

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.share = nn.Parameter(torch.empty(shape.heads)) if config.window else None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {} if self.share is None else {self.share: constant(0.0)}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        weighted, weight, after["memory"] = sums(taylor2(q), taylor2(k), v, past.get("memory"), sequence, scale=1.0)
        out = weighted / weight  # at least half a weight per token
        if self.share is not None:
            window = self.config.window
            near, kept = attend(sequence, softmax_attention, q, k, v, past=past, prefix="window_", window=window)
            out = out + torch.sigmoid(self.share)[:, None] * (near - out)
            after |= kept
        return self.out(out.flatten(2).to(x.dtype)), after
