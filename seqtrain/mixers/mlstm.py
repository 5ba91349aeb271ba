"""mLSTM, the matrix memory of xLSTM (2024, arXiv 2405.04517, eq. 19 to 27), with what xLSTM-7B adds (2503.13427).

    C_t = f_t C_{t-1} + i_t k_t^T v_t      n_t = f_t n_{t-1} + i_t k_t      h_t = q_t C_t / max(|q_t . n_t|, 1)

with an exponential input gate `i = exp(.)`. The papers' running maximum m, on which h does not depend, keeps exp from
overflowing. Here nothing can: both gates' inputs are capped softly, `c tanh(x / c)`, as in xLSTM-7B, and with c = 15 an
input gate is within 3e-7 and 3e6, whose sums the float32 states hold to 1e38. Decays are at most 1 and every term
carries its own factor, so sizes that far apart cost no precision. The forget gate is a sigmoid, as in later models.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from seqtrain.initialization import Initializer, computed, initialize
from seqtrain.layers import HeadLayerNorm, Linear, fused, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearMixer, sums


class MLSTM(LinearMixer):
    """A decayed sum of `i_t k_t^T v_t`, read relative to the sum of keys; heads are normalised, gated by a sigmoid."""

    class Config(LinearMixer.Config):
        expand_key: PositiveFloat = 0.5
        # What the inputs of both gates stay below in size, softly; an input gate is at most its exponential.
        gate_cap: Annotated[float, Field(gt=0, le=30)] = 15.0
        # Initial bias of input gates, before the exponential; xLSTM-7B takes -10, nearly shut, against spikes.
        input_bias: Annotated[float, Field(ge=-15, le=15)] = 0.0
        # Added to the variance in the norm of heads.
        norm_eps: PositiveFloat = 1e-6

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        gates = Linear(shape.width, 2 * shape.heads)
        self.gates = fused(gates, 2 * (-shape.heads,))  # input gates, then forget gates
        self.gate = Linear(shape.width, self.inner, bias=False)
        self.norm = HeadLayerNorm(self.inner, eps=config.norm_eps)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """Input gates as configured, forget gates open, later heads further, as in both papers."""
        heads, bias = self.shape.heads, self.config.input_bias
        return {self.gates.bias: computed(lambda: torch.cat([torch.full((heads,), bias), torch.linspace(3, 6, heads)]))}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        cap = self.config.gate_cap
        raw_input, raw_forget = (cap * torch.tanh(upcast(self.gates(x)) / cap)).chunk(2, 2)  # B T H
        k = upcast(k) * raw_input.exp()[..., None]
        out, weight, after["memory"] = sums(q, k, v, past.get("memory"), sequence, log_decay=F.logsigmoid(raw_forget))
        out = self.norm(out / weight.abs().clamp(min=1)) * torch.sigmoid(upcast(self.gate(x)))
        return self.out(out.to(x.dtype)), after
