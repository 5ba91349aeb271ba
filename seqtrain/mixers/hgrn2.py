"""HGRN2 (Qin et al. 2024, arXiv 2404.07904, eq. 6): a gated RNN whose state is expanded by an outer product."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadProjections, RMSNorm, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class HGRN2(Mixer):
    """`S_t = diag(f_t) S_{t-1} + (1 - f_t)^T v_t`, `f = low + (1 - low) sigmoid(W x)`: what is forgotten makes room.

    `low` rises with depth, `index / depth`, so that upper layers remember longer. The paper learns the bounds from
    there, as one running sum over all layers; here, where a layer knows no other, they stay.
    """

    @dataclass(frozen=True)
    class Config:
        # Key channels over model.width, all heads together: the state has as many times the width of a value head.
        expand_key: Annotated[float, Field(gt=0)] = 1.0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width()
        self.low = shape.index / shape.depth
        self.qfv = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value))
        self.norm = RMSNorm(shape.heads * self.value)
        self.out = nn.Linear(shape.heads * self.value, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        (q, forget, v), _ = self.qfv(x, None, sequence)
        k, log_decay = self._forget(upcast(forget))
        memory = (state or EMPTY).get("memory")
        out, memory = sequence.run(linear_attention, F.silu(q), k.to(v.dtype), v, log_decay, initial_state=memory)
        return self.out(self.norm(out.flatten(2))), {"memory": memory}

    def _forget(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """`1 - f` and `log f`, both without cancellation however large `|raw|` is."""
        k = (1 - self.low) * torch.sigmoid(-raw)
        if self.low == 0:
            return k, F.logsigmoid(raw)
        return k, torch.log1p(-k)

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.heads, self.key, self.value)}

    def weights(self) -> tuple[int, int]:
        inner = self.shape.heads * self.value
        return self.qfv.weights()[0] + inner * self.shape.width, inner

    def operator_flops(self, tokens: int) -> int:
        return linear_attention_flops(tokens, self.shape.heads, self.key, self.value)
