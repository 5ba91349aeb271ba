"""Mamba-3 (Lahoti et al. 2026, ICLR): Mamba-2 by the trapezoidal rule, with a state that turns as the token says.

The form with one input and one output a head; that with several (MIMO) is not here.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize, step_bias
from seqtrain.kernels import diagonal_scan, linear_attention
from seqtrain.layers import Linear, RMSNorm, fused, step_sizes, token_shift, turn, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State

# The least that a state forgets, `-A`.
SLOWEST = 1e-4


class Mamba3(Mixer):
    """`S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t B_{t-1}^T x_{t-1} + l_t dt_t B_t^T x_t`, `y_t = C_t S_t + D x_t`.

    `a = exp(-dt A)`, A, dt and l from the token; B and C are normalised, have a bias for each head, and are turned by
    the sum of `dt theta` so far, which stands for a complex state. No convolution: the rule's second term is one. To
    the operator a token is two, the earlier of which forgets and writes what was before.
    """

    class Config(MixerConfig):
        # Inner channels over model.width, all heads together.
        expand: PositiveFloat = 2.0
        # Channels of B and C: the key width N of the state.
        state: Annotated[int, Field(gt=0, multiple_of=4)] = 128
        # Heads share B and C in so many groups; must divide model.heads.
        groups: PositiveInt = 1
        # Share of B's and C's channels that turn, the first ones.
        turning: Annotated[float, Field(gt=0, le=1)] = 0.5
        # Added to the mean square in the norms of B and C.
        norm_eps: PositiveFloat = 1e-5

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if shape.all_heads % config.groups:
            raise self.config_error("groups", config.groups, f"must divide model.heads={shape.all_heads}")
        self.turned = 2 * int(config.turning * config.state / 2)
        if not self.turned:
            raise self.config_error("turning", config.turning, f"leaves no pair of {config.state} channels to turn")
        self.value = self.part_of_width(config.expand, "expand")
        self.inner, heads = shape.heads * self.value, shape.heads
        # z, x, and of each head the step, the rate and the trapezoid's share.
        rows = (-self.inner, *heads * (self.value,), -heads, -heads, -heads)
        self.sizes = [self.inner, self.inner, heads, heads, heads]
        self.project = fused(Linear(shape.width, sum(self.sizes), bias=False), rows, self.sizes)
        # All heads' alike, on every rank.
        self.shared = Linear(shape.width, 2 * config.groups * config.state, bias=False)
        self.angle = Linear(shape.width, self.turned // 2, bias=False)
        self.write_norm, self.read_norm = (RMSNorm(config.state, config.norm_eps) for _ in range(2))
        self.write_bias = nn.Parameter(torch.empty(heads * config.state))
        self.read_bias = nn.Parameter(torch.empty(heads * config.state))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.out = self.output(self.inner)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        ones: dict[Tensor, Initializer] = dict.fromkeys((self.write_bias, self.read_bias, self.skip), constant(1.0))
        return ones | {self.step_bias: step_bias()}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        after: State = {}
        gate, inner, step, rate, share = self.project(x).split(self.sizes, 2)
        dt = step_sizes(step, self.step_bias)  # B T H
        log_decay = -F.softplus(upcast(rate)).clamp(min=SLOWEST) * dt
        theta = math.pi * torch.tanh(upcast(self.angle(x)))
        turns = (dt[..., None] * theta[:, :, None]).flatten(2)  # B T H*turned/2
        kept = turns.new_zeros(turns.shape[2])
        angle, after["angle"] = sequence.run(diagonal_scan, turns, kept, initial_state=past.get("angle"))
        write, read = self.shared(x).chunk(2, 2)
        k = self._turned(self.write_norm, write, self.write_bias, angle)
        q = self._turned(self.read_norm, read, self.read_bias, angle)
        v = inner.unflatten(2, (-1, self.value))
        now = torch.cat([k.to(x.dtype), v], 3)
        before, after["last"] = token_shift(now.flatten(2), past.get("last"), sequence)
        both = torch.stack([before.view_as(now), now], 2)  # B T 2 H N+V
        share = torch.sigmoid(upcast(share))
        weight = torch.stack([(1 - share) * dt * log_decay.exp(), share * dt], 2)  # B T 2 H
        k, v2 = both.flatten(1, 2).split([self.config.state, self.value], 3)
        v2 = (v2 * weight.flatten(1, 2)[..., None]).to(v.dtype)
        q2 = F.pad(q.to(x.dtype)[:, :, None], (0, 0, 0, 0, 1, 0)).flatten(1, 2)
        decay = F.pad(log_decay[:, :, None], (0, 0, 0, 1)).flatten(1, 2)
        out, after["memory"] = sequence.repeated(2).run(
            linear_attention, q2, k, v2, decay, scale=1.0, initial_state=past.get("memory")
        )
        out = (out[:, 1::2] + v * self.skip[:, None]).flatten(2) * F.silu(gate)
        return self.out(out.to(x.dtype)), after

    def _turned(self, norm: RMSNorm, part: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        """B or C of all groups, `[B,T,groups*N]`, as each of this rank's heads has it, `[B,T,H,N]`."""
        state, heads, tensor = self.config.state, self.shape.heads, self.shape.tensor
        grouped = norm(part.unflatten(2, (-1, state))).repeat_interleave(self.shape.all_heads // self.config.groups, 2)
        own = upcast(grouped.narrow(2, tensor.rank * heads, heads)) + bias.view(heads, state)
        turning, still = own.split([self.turned, state - self.turned], 3)
        return torch.cat([turn(turning, angle.unflatten(2, (heads, -1))), still], 3)
