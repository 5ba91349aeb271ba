"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a state-space layer with a state, and decays, for each channel.

What the scan works on, states of all channels at all tokens, is computed again in the backward pass: kept, it would be
as many times what a layer keeps else as a state has numbers.
"""

import math
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqtrain.initialization import Initializer, computed, constant, initialize, step_bias, uniform
from seqtrain.kernels import diagonal_scan
from seqtrain.layers import Linear, RMSNorm, ShortConvolution, fused, step_sizes, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.parallel.recompute import kept
from seqtrain.parallel.scan import checkpoint_contexts


class Mamba(Mixer):
    """`h_t[d] = exp(-dt_t[d] A[d]) h_{t-1}[d] + dt_t[d] x_t[d] B_t`, `y_t[d] = h_t[d] . C_t + D[d] x_t[d]`, gated.

    x is a convolved projection of the layer's input, dt, B and C are projections of x, dt one of low rank.
    """

    class Config(MixerConfig):
        # Inner channels over model.width.
        expand: PositiveFloat = 2.0
        # Inner channels; 0: as expand says.
        inner_width: NonNegativeInt = 0
        # Numbers N in the state of a channel.
        state: PositiveInt = 16
        # Tokens under the short convolution.
        conv_width: Annotated[int, Field(ge=2, le=16)] = 4
        # Rank of the step sizes' projection; 0: model.width / 16, rounded up.
        rank: NonNegativeInt = 0
        # Norms of what step sizes, B and C are made of: none, without weights (FalconMamba), with weights (Jamba).
        norms: Literal["none", "plain", "learned"] = "none"
        # Added to the mean square in these.
        norm_eps: PositiveFloat = 1e-6
        # True: the projections into and out of the layer have biases; the short convolution has one.
        bias: bool = False
        conv_bias: bool = True

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        given = config.inner_width
        self.inner = shape.share(given, f"{given} channels of Mamba") if given else self.hidden_channels(config.expand)
        rank = config.rank or math.ceil(shape.width / 16)
        self.parts = [rank, config.state, config.state]  # dt, B, C
        self.project = fused(Linear(shape.width, 2 * self.inner, bias=config.bias), (self.inner, -self.inner))
        self.conv = ShortConvolution(self.inner, config.conv_width, bias=config.conv_bias)
        self.select = fused(Linear(self.inner, sum(self.parts), bias=False), self.parts)
        self.time_step = Linear(rank, self.inner, bias=False)
        self.step_bias = nn.Parameter(torch.empty(self.inner))
        self.rate_log = nn.Parameter(torch.empty(self.inner * config.state))
        self.skip = nn.Parameter(torch.empty(self.inner))
        self.norms = nn.ModuleList(self._norm(width) for width in self.parts)
        self.out = self.output(self.inner, bias=config.bias)
        initialize(self)

    def _norm(self, width: int) -> nn.Module:
        kind, eps = self.config.norms, self.config.norm_eps
        if kind == "none":
            return nn.Identity()
        return RMSNorm(width, eps) if kind == "learned" else nn.RMSNorm(width, eps, elementwise_affine=False)

    def initializers(self) -> dict[Tensor, Initializer]:
        """A is 1 to N in every channel."""
        bound, states, inner = self.parts[0] ** -0.5, self.config.state, self.inner
        return {
            self.time_step.weight: uniform(-bound, bound),
            self.step_bias: step_bias(),
            self.rate_log: computed(lambda: torch.arange(1.0, states + 1).log().repeat(inner)),
            self.skip: constant(1.0),
        }

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        inner, gate = self.project(x).chunk(2, 2)
        inner, conv = self.conv(inner, past.get("conv"), sequence)
        parts = self.shape.tensor.total(self.select(inner)).split(self.parts, 2)
        raw, write, read = (norm(part) for norm, part in zip(self.norms, parts, strict=True))
        dt, rates = step_sizes(self.time_step(raw), self.step_bias), self.rate_log.exp().view(self.inner, -1)
        y, memory = self._scanned(inner, dt, write, read, rates, past.get("memory"), sequence)
        y = (y + inner * self.skip) * F.silu(gate)
        return self.out(y.to(x.dtype)), {"conv": conv, "memory": memory}

    def _scanned(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return selective_scan(*inputs)
        contexts: dict[str, Any] = {"context_fn": checkpoint_contexts} if inputs[-1].sends else {}
        scan = partial(checkpoint, selective_scan, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)
        found: tuple[Tensor, Tensor] = kept(scan, inputs[:-1])
        return found


def selective_scan(
    x: Tensor, dt: Tensor, write: Tensor, read: Tensor, rates: Tensor, past: Tensor | None, sequence: SequenceContext
) -> tuple[Tensor, Tensor]:
    """What channels read of their states, in float32 at least, and the last of these, `[B,D*N]`.

    `x`, `dt`: `[B,T,D]`. `write` (B), `read` (C): `[B,T,N]`. `rates` (A): `[D,N]`.
    """
    written = (dt * upcast(x))[..., None] * upcast(write)[:, :, None]  # B T D N
    log_a = -dt[..., None] * rates
    hidden, memory = sequence.run(diagonal_scan, written.flatten(2), log_a.flatten(2), initial_state=past)
    return torch.matmul(hidden.view_as(written), upcast(read)[..., None])[..., 0], memory
