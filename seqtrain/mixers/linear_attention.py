"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) with a choice of feature map and normalizer.

`elu` with `sum` is that paper's; `taylor2` with `sum` is Based (arXiv 2402.18668); `rms` is NormAttention (arXiv
2210.10340).
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import ProjectedMixer
from seqtrain.mixers.common.recurrence import LinearRecurrence


class LinearAttention(ProjectedMixer):
    """`o_t = phi(q_t) sum_{j<=t} phi(k_j)^T v_j`, over `phi(q_t) . sum_j phi(k_j)` or over its root mean square."""

    recurrence = LinearRecurrence

    class Config(ProjectedMixer.Config):
        # What queries and keys pass through: identity, elu (elu + 1), relu, or taylor2 (second-order Taylor of exp).
        # taylor2 has K^2/2 features per head: keep expand_key small.
        feature_map: Literal["identity", "elu", "relu", "taylor2"] = "elu"
        # What the output is divided by: sum (of the weights), rms (of each head's output), none.
        normalizer: Literal["sum", "rms", "none"] = "sum"
        conv_width: Annotated[int, Field(ge=0, le=16)] = 0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.feature_map, non_negative = FEATURE_MAPS[config.feature_map]
        if config.normalizer == "sum" and not non_negative:
            rule = f"needs non-negative weights, which feature_map={config.feature_map} does not give; use rms or none"
            raise self.config_error("normalizer", "sum", rule)
        self.norm = HeadNorm(self.value) if config.normalizer == "rms" else None
        self.out = self.output(self.inner)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = self.feature_map(q), self.feature_map(k)
        summed = self.config.normalizer == "sum"
        if summed:
            # The same recurrence sums the keys: a column of ones next to the values (docs/math.md, section 1.1).
            v = F.pad(v, (0, 1), value=1.0)
        out, after["memory"] = sequence.run(linear_attention, q, k, v, initial_state=past.get("memory"))
        if summed:
            # The sum is 0 only where every weight is (relu): then so is the numerator.
            out = (upcast(out[..., :-1]) / upcast(out[..., -1:]).clamp(min=1e-6)).to(x.dtype)
        out = out.flatten(2) if self.norm is None else self.norm(out)
        return self.out(out), after
