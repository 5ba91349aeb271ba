"""minGRU (Feng et al. 2024, arXiv 2410.01201): a gated RNN whose gates see the token alone, so that it is a scan."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from seqtrain.kernels import diagonal_scan
from seqtrain.layers import Linear, fused, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


def positive(x: Tensor) -> Tensor:
    """`x + 1/2` from 0 on, `sigmoid(x)` below: positive, and linear where it is large (the paper's appendix B)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGRU(Mixer):
    """`h_t = (1 - z_t) h_{t-1} + z_t c_t` with `z = sigmoid(W_z x)` and a candidate `c` from `W_h x`."""

    class Config(MixerConfig):
        # Hidden channels over model.width, rounded down.
        expand: PositiveFloat = 1.0
        # The candidate: linear (the plain form) or positive (the form the paper computes in logarithms).
        candidate: Literal["linear", "positive"] = "positive"

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.hidden = self.hidden_channels(config.expand)
        self.parts = fused(Linear(shape.width, 2 * self.hidden, bias=False), (-self.hidden, self.hidden))
        self.out = self.output(self.hidden)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        gate, candidate = upcast(self.parts(x)).chunk(2, -1)
        if self.config.candidate == "positive":
            candidate = positive(candidate)
        written, log_a = torch.sigmoid(gate) * candidate, F.logsigmoid(-gate)
        hidden, memory = sequence.run(diagonal_scan, written, log_a, initial_state=past.get("memory"))
        return self.out(hidden.to(x.dtype)), {"memory": memory}
