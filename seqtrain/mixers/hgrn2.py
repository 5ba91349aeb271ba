"""HGRN2 (Qin et al. 2024, arXiv 2404.07904, eq. 6): a gated RNN whose state is expanded by an outer product."""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant
from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadProjections, RMSNorm, log_forget, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import Heads, LinearRecurrence, RecurrenceOptions


class HGRN2Recurrence(LinearRecurrence):
    """`f = sigmoid(k + b) ** (1 / temperature)` is what a channel keeps and `1 - f` what it takes in."""

    maps_keys = False

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.bias = nn.Parameter(torch.empty(heads.groups * heads.key))

    def initializers(self) -> dict[Tensor, Initializer]:
        return super().initializers() | {self.bias: constant(self.options.gate_bias)}

    def features(self, x: Tensor) -> Tensor:
        return upcast(x).softmax(-1)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = log_forget(upcast(k) + self.bias.view(self.heads.groups, -1), self.options.temperature)
        return {"k": -torch.expm1(decay).to(v.dtype), "v": v, "log_decay": decay}


class HGRN2(Mixer):
    """`S_t = diag(f_t) S_{t-1} + (1 - f_t)^T v_t`, `f = low + (1 - low) sigmoid(W x)`: what is forgotten makes room.

    `low` rises with depth, `index / depth`, so that upper layers remember longer; the paper learns it from there.
    """

    recurrence = HGRN2Recurrence

    class Config(MixerConfig):
        # Key channels over model.width, all heads together: the state has as many times the width of a value head.
        expand_key: PositiveFloat = 1.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width()
        self.low = shape.index / shape.depth
        self.qfv = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value))
        self.norm = RMSNorm(shape.heads * self.value, tensor=shape.tensor)
        self.out = self.output(shape.heads * self.value)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, forget, v), _ = self.qfv(x, None, sequence)
        # Neither `1 - f` nor `log f` cancels, however large the gate's input is.
        k = (1 - self.low) * torch.sigmoid(-upcast(forget))
        log_decay = torch.log1p(-k) if self.low else F.logsigmoid(upcast(forget))
        tensors = F.silu(q), k.to(v.dtype), v, log_decay
        out, memory = sequence.run(linear_attention, *tensors, initial_state=past.get("memory"))
        return self.out(self.norm(out.flatten(2))), {"memory": memory}
