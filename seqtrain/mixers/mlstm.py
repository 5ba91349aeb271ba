"""mLSTM, the matrix memory of xLSTM (2024, arXiv 2405.04517, eq. 19 to 27), with what xLSTM-7B adds (2503.13427).

    C_t = f_t C_{t-1} + i_t k_t^T v_t      n_t = f_t n_{t-1} + i_t k_t      h_t = q_t C_t / max(|q_t . n_t|, 1)

with an exponential input gate `i = exp(.)`. The papers carry `m_t = max(log f_t + m_{t-1}, log i_t)` and divide C, n
and the 1 by exp(m_t): h does not depend on m, which only keeps exp from overflowing. Here nothing can overflow, so
there is no m. Both gates' inputs are capped softly, `c tanh(x / c)`, as in xLSTM-7B; with c = 15 an input gate is
within 3e-7 and 3e6, and float32, in which states are kept, holds sums of those to 1e38. Decays are at most 1 and every
term of a sum carries its own factor, so sizes that far apart cost no more precision than equal ones. The forget gate is
a sigmoid; an exponential one, which may exceed 1, is left out, as in the authors' later models.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from seqtrain.layers import HeadLayerNorm, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearConfig, LinearMixer, sums


class MLSTM(LinearMixer):
    """A decayed sum of `i_t k_t^T v_t`, read relative to the sum of keys; heads are normalised, gated by a sigmoid."""

    @dataclass(frozen=True)
    class Config(LinearConfig):
        # Key channels over model.width, all heads together.
        expand_key: PositiveFloat = 0.5
        # What the inputs of both gates stay below in size, softly; an input gate is at most its exponential.
        gate_cap: Annotated[float, Field(gt=0, le=30)] = 15.0
        # Initial bias of input gates, before the exponential; xLSTM-7B takes -10, nearly shut, against spikes.
        input_bias: Annotated[float, Field(ge=-15, le=15)] = 0.0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.gates = nn.Linear(shape.width, 2 * shape.heads)  # input gates, then forget gates
        self.gate = nn.Linear(shape.width, self.inner, bias=False)
        self.norm = HeadLayerNorm(self.inner)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Input gates as configured, forget gates open, later heads further, as in both papers."""
        write, keep = self.gates.bias.chunk(2)
        write.fill_(self.config.input_bias)
        keep.copy_(torch.linspace(3, 6, self.shape.heads))

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        cap = self.config.gate_cap
        raw_input, raw_forget = (cap * torch.tanh(upcast(self.gates(x)) / cap)).chunk(2, 2)  # B T H
        k = upcast(k) * raw_input.exp()[..., None]
        out, weight, after["memory"] = sums(q, k, v, past.get("memory"), sequence, log_decay=F.logsigmoid(raw_forget))
        out = self.norm(out / weight.abs().clamp(min=1)) * torch.sigmoid(upcast(self.gate(x)))
        return self.out(out.to(x.dtype)), after
