"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7): a state-space layer with one decay per head."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, decay_rate, initialize, step_bias
from seqtrain.kernels import linear_attention
from seqtrain.layers import Linear, RMSNorm, ShortConvolution, fused, step_sizes
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import Heads, LinearRecurrence, RecurrenceOptions, StepDecay
from seqtrain.mixers.common.take_over import (
    Projections,
    copy_projections,
    forget_slowly,
    fused_projections,
    gate_rows,
    pass_on,
)


class Mamba2Recurrence(LinearRecurrence):
    """`a = exp(-dt A)`, and a key is written dt strong, `dt = softplus(W x + b)`."""

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.step = StepDecay(heads.width, heads.groups, heads.groups, options)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay, dt = self.step(x)
        written = super().write(x, k, v)
        return written | {"k": (written["k"] * dt[..., None]).to(v.dtype), "log_decay": decay}


class Mamba2(Mixer):
    """`S_t = exp(-dt_t A) S_{t-1} + B_t^T (dt_t x_t)`, `y_t = C_t S_t + D x_t`; groups of heads share B and C."""

    recurrence = Mamba2Recurrence

    class Config(MixerConfig):
        # Inner channels over model.width, all heads together.
        expand: PositiveFloat = 2.0
        # Channels of B and C per group: the key width N of the state.
        state: PositiveInt = 128
        # Heads share B and C, and are normalised together, in so many groups; must divide model.heads.
        groups: PositiveInt = 1
        # Tokens under the short convolution of x, B and C.
        conv_width: Annotated[int, Field(ge=2, le=16)] = 4
        # Heads; 0: model.heads.
        heads: NonNegativeInt = 0
        # Channels of a head; 0: as expand says.
        head_width: NonNegativeInt = 0
        # Step sizes stay within these; step_max=0: no upper limit.
        step_min: NonNegativeFloat = 0.0
        step_max: NonNegativeFloat = 0.0
        # How the gate is applied: before the norm, after it, or without a norm.
        gate: Literal["before_norm", "after_norm", "no_norm"] = "before_norm"
        # Added to the mean square in that norm.
        norm_eps: PositiveFloat = 1e-6
        # True: the projection into the layer, the short convolution, the projection out of it have a bias.
        in_bias: bool = False
        conv_bias: bool = True
        out_bias: bool = False
        # Factors on the projected gate, x, B, C and step sizes (Falcon-H1).
        scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if shape.all_heads % config.groups:
            raise self.config_error("groups", config.groups, f"must divide model.heads={shape.all_heads}")
        # Groups of this rank's heads. Where ranks are more, each makes a part of a group's B and C, see `_to_heads`.
        self.groups = (
            1 if shape.tensor.count % config.groups == 0 else shape.share(config.groups, "mixer.mamba2.groups")
        )
        self.value = config.head_width or self.part_of_width(config.expand, "expand")
        self.inner = shape.heads * self.value
        shared = shape.share(config.groups * config.state, "mixer.mamba2.state x groups")
        self.parts = [self.inner, shared, shared]  # x, B, C
        self.channels = sum(self.parts)
        # z, heads of x, groups of B and C, step sizes.
        state = min(config.state, shared)
        rows = (-self.inner, *shape.heads * (self.value,), *2 * (shared // state) * (state,), -shape.heads)
        parts = (self.inner, *self.parts, shape.heads)
        self.project = fused(Linear(shape.width, sum(parts), bias=config.in_bias), rows, parts)
        self.conv = ShortConvolution(self.channels, config.conv_width, bias=config.conv_bias, parts=self.parts)
        self.rate_log = nn.Parameter(torch.empty(shape.heads))
        self.step_bias = nn.Parameter(torch.empty(shape.heads))
        self.skip = nn.Parameter(torch.empty(shape.heads))
        options: dict[str, Any] = {"groups": config.groups, "gate_first": config.gate == "before_norm"}
        options["tensor"] = shape.tensor
        self.norm = None if config.gate == "no_norm" else RMSNorm(self.inner, config.norm_eps, **options)
        self.out = self.output(self.inner, bias=config.out_bias)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.rate_log: decay_rate(), self.step_bias: step_bias(), self.skip: constant(1.0)}

    def projections(self) -> Projections:
        return fused_projections("project.weight", self.parts, "vkq", self.inner)

    @torch.no_grad()
    def init_from_attention(self, attention: Any) -> None:
        """Values are x, keys B, queries C; one head or several in the place of each (arXiv 2408.15237)."""
        if {self.value, self.config.state} != {attention.key} or self.config.groups != attention.shape.heads:
            raise self.config_error("state", self.config.state, "must be a head of the attention it replaces")
        copy_projections(self, attention)
        self.project.weight[: self.inner] = gate_rows(attention, self.shape.heads)
        pass_on(self.conv, attention, dict(zip("vkq", self.parts, strict=True)))
        self.skip.zero_()
        forget_slowly(self.rate_log)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        gate, mixed, raw = self._projected(x).split([self.inner, self.channels, self.shape.heads], 2)
        mixed, conv = self.conv(mixed, past.get("conv"), sequence)
        inner, write, read = mixed.split(self.parts, 2)
        inner = inner.unflatten(2, (self.shape.heads, self.value))  # B T H V
        dt = self._steps(raw)
        written = self._to_heads(write), (inner * dt[..., None]).to(inner.dtype), -dt * self.rate_log.exp()
        out, memory = sequence.run(
            linear_attention, self._to_heads(read), *written, scale=1.0, initial_state=past.get("memory")
        )
        out = (out + inner * self.skip[:, None]).flatten(2)
        out = out * F.silu(gate) if self.norm is None else self.norm(out, gate)
        return self.out(out.to(x.dtype)), {"conv": conv, "memory": memory}

    def _projected(self, x: Tensor) -> Tensor:
        """Gate, x, B, C and step sizes one after the other, `[B,T,...]`."""
        x, scales = self.project(x), self.config.scales
        if set(scales) == {1.0}:
            return x
        sizes = (self.inner, *self.parts, self.shape.heads)
        return x * torch.cat([x.new_full((size,), scale) for size, scale in zip(sizes, scales, strict=True)])

    def _steps(self, raw: Tensor) -> Tensor:
        """Step sizes `[B,T,H]`."""
        dt, low, high = step_sizes(raw, self.step_bias), self.config.step_min, self.config.step_max
        return dt.clamp(low, high or None) if low or high else dt

    def _to_heads(self, part: Tensor) -> Tensor:
        groups, tensor = self.config.groups, self.shape.tensor
        if groups < tensor.count:
            group = tensor.rank * groups // tensor.count
            part = tensor.enter(tensor.join(part)).narrow(2, group * self.config.state, self.config.state)
        grouped = part.unflatten(2, (self.groups, 1, self.config.state))
        # A view where there is one group, which is what Mamba-2 uses.
        return grouped.expand(-1, -1, -1, self.shape.heads // self.groups, -1).flatten(2, 3)  # B T H N
