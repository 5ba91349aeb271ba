"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) with a choice of feature map and normaliser.

`elu` with `sum` is that paper's; `taylor2` with `sum` is Based (arXiv 2402.18668); `rms` is NormAttention (arXiv
2210.10340).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, HeadProjections, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class LinearAttention(Mixer):
    """`o_t = phi(q_t) sum_{j<=t} phi(k_j)^T v_j`, over `phi(q_t) . sum_j phi(k_j)` or over its root mean square."""

    @dataclass(frozen=True)
    class Config:
        # What queries and keys pass through: identity, elu (elu + 1), relu, or taylor2 (second-order Taylor of exp).
        feature_map: Literal["identity", "elu", "relu", "taylor2"] = "elu"
        # What the output is divided by: sum (of the weights), rms (of each head's output), none.
        normalizer: Literal["sum", "rms", "none"] = "sum"
        # Key channels over model.width, all heads together; taylor2 has K^2/2 features a head: keep it small.
        expand_key: Annotated[float, Field(gt=0)] = 1.0
        # Value channels over model.width, all heads together.
        expand_value: Annotated[float, Field(gt=0)] = 1.0
        # Tokens under the short convolution of q, k and v; 0: none.
        conv_width: Annotated[int, Field(ge=0, le=16)] = 0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.feature_map, count, non_negative = FEATURE_MAPS[config.feature_map]
        if config.normalizer == "sum" and not non_negative:
            rule = f"needs non-negative weights, which feature_map={config.feature_map} does not give; use rms or none"
            raise self.config_error("normalizer", "sum", rule)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        self.features = count(self.key)
        self.qkv = HeadProjections(
            shape.width, shape.heads, (self.key, self.key, self.value), conv_width=config.conv_width
        )
        self.norm = HeadNorm(self.value) if config.normalizer == "rms" else None
        self.out = nn.Linear(shape.heads * self.value, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = self.feature_map(q), self.feature_map(k)
        summed = self.config.normalizer == "sum"
        if summed:
            # The same recurrence sums the keys: a column of ones beside the values (MATH.md 1.1).
            v = F.pad(v, (0, 1), value=1.0)
        out, after["memory"] = sequence.run(linear_attention, q, k, v, initial_state=past.get("memory"))
        if summed:
            # The sum is 0 only where every weight is (relu): then so is the numerator.
            out = (upcast(out[..., :-1]) / upcast(out[..., -1:]).clamp(min=1e-6)).to(x.dtype)
        out = out.flatten(2) if self.norm is None else self.norm(out)
        return self.out(out), after

    def _columns(self) -> int:
        return self.value + (self.config.normalizer == "sum")

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        memory = (batch, self.shape.heads, self.features, self._columns())
        return {"memory": memory, **self.qkv.state_shapes(batch)}

    def weights(self) -> tuple[int, int]:
        matrices, others = self.qkv.weights()
        norm = self.value if self.config.normalizer == "rms" else 0
        return matrices + self.shape.heads * self.value * self.shape.width, others + norm

    def operator_flops(self, tokens: int) -> int:
        memory = linear_attention_flops(tokens, self.shape.heads, self.features, self._columns())
        return memory + self.qkv.flops(tokens)
