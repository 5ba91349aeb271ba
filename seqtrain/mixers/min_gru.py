"""minGRU (Feng et al. 2024, arXiv 2410.01201): a gated RNN whose gates see the token alone, so that it is a scan."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import diagonal_scan
from seqtrain.layers import upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import real_scan_flops
from seqtrain.parallel.sequence import SequenceContext


def positive(x: Tensor) -> Tensor:
    """`x + 1/2` from 0 on, `sigmoid(x)` below: positive, and linear where it is large (the paper's appendix B)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGRU(Mixer):
    """`h_t = (1 - z_t) h_{t-1} + z_t c_t` with `z = sigmoid(W_z x)` and a candidate `c` from `W_h x`."""

    @dataclass(frozen=True)
    class Config:
        # Hidden channels over model.width, rounded down.
        expand: Annotated[float, Field(gt=0)] = 1.0
        # The candidate: linear (the plain form) or positive (the form the paper computes in logarithms).
        candidate: Literal["linear", "positive"] = "positive"

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.hidden = int(config.expand * shape.width)
        if not self.hidden:
            raise self.config_error("expand", config.expand, f"leaves no channel of model.width={shape.width}")
        self.parts = nn.Linear(shape.width, 2 * self.hidden, bias=False)
        self.out = nn.Linear(self.hidden, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        gate, candidate = upcast(self.parts(x)).chunk(2, -1)
        if self.config.candidate == "positive":
            candidate = positive(candidate)
        memory = (state or EMPTY).get("memory")
        hidden, memory = sequence.run(
            diagonal_scan, torch.sigmoid(gate) * candidate, F.logsigmoid(-gate), initial_state=memory
        )
        return self.out(hidden.to(x.dtype)), {"memory": memory}

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.hidden)}

    def weights(self) -> tuple[int, int]:
        return 3 * self.shape.width * self.hidden, 0

    def operator_flops(self, tokens: int) -> int:
        return real_scan_flops(tokens, self.hidden)
