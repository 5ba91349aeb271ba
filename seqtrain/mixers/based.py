"""Based ("Simple linear attention language models balance the recall-throughput tradeoff", 2024, arXiv 2402.18668)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import softmax_attention
from seqtrain.layers import FEATURE_MAPS
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, State
from seqtrain.mixers._costs import softmax_attention_flops
from seqtrain.mixers._linear import LinearConfig, LinearMixer, sums
from seqtrain.parallel.sequence import SequenceContext

TAYLOR, FEATURE_COUNT, _ = FEATURE_MAPS["taylor2"]


class Based(LinearMixer):
    """Softmax over a short window, and its second-order Taylor polynomial over all of the past.

    Both weigh the same values by the same scores `s = q . k / sqrt(K)`: exp(s) near by, where precision counts, and
    `1 + s + s^2 / 2` everywhere, in a state of constant size. Each head learns how much of either it takes. The paper
    has layers of one kind and of the other: `window: 0` here, with `model.layers=[based, sliding_attention]`.
    """

    state_dtypes: ClassVar = {"window_length": torch.int64}

    @dataclass(frozen=True)
    class Config(LinearConfig):
        # Key channels over model.width, all heads together; K channels a head make about K^2/2 features: keep it small.
        expand_key: Annotated[float, Field(gt=0)] = 0.25
        # Tokens under the softmax, a token's own included; 0: none, the Taylor polynomial alone.
        window: Annotated[int, Field(ge=0)] = 64

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.share = nn.Parameter(torch.zeros(shape.heads)) if config.window else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.share is not None:
            nn.init.zeros_(self.share)

    @staticmethod
    def feature_count(key: int) -> int:
        return FEATURE_COUNT(key)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        weighted, weight, after["memory"] = sums(TAYLOR(q), TAYLOR(k), v, past.get("memory"), sequence, scale=1.0)
        out = weighted / weight  # at least half a weight a token
        if self.share is not None:
            near, window = self._near(q, k, v, past, sequence)
            out = out + torch.sigmoid(self.share)[:, None] * (near - out)
            after |= window
        return self.out(out.flatten(2).to(x.dtype)), after

    def _near(
        self, q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        """Softmax attention over the window, `[B,T,H,V]`, and its part of the state."""
        kept = {name.removeprefix("window_"): tensor for name, tensor in past.items() if name.startswith("window_")}
        out, kept = sequence.run(softmax_attention, q, k, v, window=self.config.window, initial_state=kept or None)
        return out, {f"window_{name}": tensor for name, tensor in kept.items()}

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        shapes = super().state_shapes(batch, tokens)
        if self.config.window:
            rows = (batch, self.config.window - 1, self.shape.heads)
            shapes |= {"window_k": (*rows, self.key), "window_v": (*rows, self.value), "window_length": (batch,)}
        return shapes

    def weights(self) -> tuple[int, int]:
        matrices, others = super().weights()
        return matrices, others + (self.shape.heads if self.config.window else 0)

    def operator_flops(self, tokens: int) -> int:
        window = self.config.window
        near = softmax_attention_flops(tokens, self.shape.heads, self.key, self.value, window) if window else 0
        return super().operator_flops(tokens) + near
