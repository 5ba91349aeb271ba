"""HGRN (Qin et al. 2023, arXiv 2311.04823): a gated RNN with complex states and forget gates that rise with depth."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, constant, initialize
from seqtrain.kernels import diagonal_scan
from seqtrain.layers import NORM_EPS, Linear, fused, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.parallel.tensor import TensorParallel

# Where in its share of [0, 1] a layer's bound starts: low, since the paper's first layer has none.
START = 0.1


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm of float32 numbers, whatever the dtype of its weights, of which `tensor`'s ranks have parts."""

    def __init__(self, width: int, eps: float, tensor: TensorParallel):
        super().__init__(width, eps)
        self.tensor, halves = tensor, (0, 2 * (width // 2,))
        self.tensor_parts = {"weight": halves, "bias": halves}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = upcast(self.weight), upcast(self.bias)
        if self.tensor.count == 1:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        channels = x.shape[-1] * self.tensor.count
        x = x - self.tensor.total(x.sum(-1, keepdim=True)) / channels
        variance = self.tensor.total(x.square().sum(-1, keepdim=True)) / channels
        return x * torch.rsqrt(variance + self.eps) * weight + bias


class HGRN(Mixer):
    """`h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t`, `f = low + (1 - low) sigmoid(W_f x)`, read through a gated norm.

    `c = silu(W_r x) + i silu(W_i x)`, `y = norm(sigmoid(W_g x) * [Re h, Im h])`; theta is learned, the same for all
    tokens. Lower bounds are learned per channel: layer l of L has them in `[l/L, (l+1)/L]`, where the paper's rise in
    learned steps, by a running sum of a softmax over all layers; a layer here needs to know of no other.
    """

    class Config(MixerConfig):
        # Complex hidden channels over model.width, rounded down.
        expand: PositiveFloat = 1.0
        # Base of the initial rotations: channel i of n starts with theta = base ** (-i / n) radians per token.
        theta_base: Annotated[float, Field(gt=1)] = 10000.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.hidden = self.hidden_channels(config.expand)
        # Candidate (real, imaginary), forget gate, and the output gate of both parts.
        rows = (self.hidden, self.hidden, -self.hidden, -2 * self.hidden)
        self.parts = fused(Linear(shape.width, 5 * self.hidden, bias=True), rows, 5 * (self.hidden,))
        self.bound = nn.Parameter(torch.empty(self.hidden))
        self.theta = nn.Parameter(torch.empty(self.hidden))
        self.norm = WideLayerNorm(2 * self.hidden, NORM_EPS, shape.tensor)
        self.out = self.output(2 * self.hidden, parts=2 * (self.hidden,))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        hidden, base = self.hidden, self.config.theta_base
        theta = computed(lambda: base ** (-torch.arange(hidden, dtype=torch.float64, device="cpu") / hidden))
        return {self.bound: constant(math.log(START / (1 - START))), self.theta: theta}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        real, imaginary, forget, gate = self.parts(x).split([self.hidden] * 3 + [2 * self.hidden], 2)
        low = (self.shape.index + torch.sigmoid(self.bound)) / self.shape.depth
        free = torch.log1p(-low)
        # 1 - f and log f, both without cancellation however large the gate's input is.
        log_write = free + F.logsigmoid(-upcast(forget))
        log_forget = torch.logaddexp(low.log(), free + F.logsigmoid(upcast(forget)))
        candidate = torch.complex(F.silu(upcast(real)), F.silu(upcast(imaginary)))
        log_a = torch.complex(log_forget, self.theta.to(log_forget.dtype).expand(log_forget.shape))
        written = log_write.exp() * candidate
        hidden, memory = sequence.run(diagonal_scan, written, log_a, initial_state=past.get("memory"))
        read = torch.cat([hidden.real, hidden.imag], 2) * torch.sigmoid(upcast(gate))
        return self.out(self.norm(read).to(x.dtype)), {"memory": memory}
