"""Recurrent memories that read and write with an attention layer's own queries, keys and values.

They are what a converted layer keeps of tokens its window has passed (or of all tokens). Each has the update of the
mixer it is named after; where that mixer has projections of its own for q, k and v, the memory takes the attention's.
Keys, values and states are one for each key head, however many query heads share it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.kernels import delta_rule, linear_attention
from seqtrain.layers import LowRank, l2norm, reset_decay_rate, reset_step_bias, step_sizes, upcast
from seqtrain.mixers._base import State
from seqtrain.mixers._costs import delta_rule_flops, linear_attention_flops
from seqtrain.mixers._slots import run_grouped, slot_attention, slot_flops, slot_shapes
from seqtrain.parallel.sequence import SequenceContext

# Gates that are new start with a sigmoid of this, to the power 1/16: half is forgotten in 230 tokens.
SLOW = 3.0
TEMPERATURE = 16.0


@dataclass(frozen=True)
class Heads:
    """An attention layer's sizes: D, H query heads, G key heads, K channels of a head (of q, k and v alike)."""

    width: int
    heads: int
    groups: int
    key: int


class Memory(nn.Module):
    """Maps what tokens write, `[B,T,G,...]`, and queries `[B,T,H,K]` to what the queries read, `[B,T,H,K]`.

    What is read has the size of a value. A token whose written tensors are all zero leaves the memory as it is.
    """

    # Whether it knows how much it holds for a query: then it can be one more term of a softmax.
    has_mass: ClassVar[bool] = False

    def __init__(self, shape: Heads):
        super().__init__()
        self.shape = shape

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What each token writes, from the layer's input `[B,T,D]`, keys and values `[B,T,G,K]` (not rotated)."""
        raise NotImplementedError

    def read(
        self, q: Tensor, written: Mapping[str, Tensor], past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, Tensor | None, State]:
        """`(value [B,T,H,K], logarithm of the mass [B,T,H] or None, state)`."""
        raise NotImplementedError

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what a token writes, without batch and time."""
        raise NotImplementedError

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def flops(self, tokens: int) -> int:
        """Of the operator over one sequence."""
        raise NotImplementedError

    def weights(self) -> tuple[int, int]:
        """Parameters of matrices, and all others."""
        sizes = [(parameter.dim() >= 2, parameter.numel()) for parameter in self.parameters()]
        return sum(size for matrix, size in sizes if matrix), sum(size for matrix, size in sizes if not matrix)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises every parameter: small matrices, and gates that forget slowly."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)


class Additive(Memory):
    """`S_t = diag(a_t) S_{t-1} + phi(k_t)^T v_t` over its mass `phi(q_t) . z_t`; phi is positive.

    phi(x) = [softmax(W x), softmax(-W x)] (Hedgehog, arXiv 2402.04347), W a learned square matrix for each head of the
    queries and of the keys, at the start the identity. Without a decay: linear attention.
    """

    has_mass = True
    # False where what a key writes is not its features.
    maps_keys: ClassVar[bool] = True

    def __init__(self, shape: Heads):
        super().__init__(shape)
        self.query_map = nn.Parameter(torch.empty(shape.heads, shape.key, shape.key))
        self.key_map = nn.Parameter(torch.empty(shape.groups, shape.key, shape.key)) if self.maps_keys else None
        self._reset_maps()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self._reset_maps()

    def _reset_maps(self) -> None:
        with torch.no_grad():
            for each in (self.query_map, self.key_map):
                if each is not None:
                    each.copy_(torch.eye(self.shape.key))

    def mapped(self, x: Tensor, maps: Tensor | None) -> Tensor:
        """The features of `x: [B,T,heads,K]` times a matrix `[heads,K,K]` for each head."""
        return self.features(x if maps is None else torch.einsum("bthk,hkj->bthj", upcast(x), upcast(maps)))

    def features(self, x: Tensor) -> Tensor:
        """`[...,K]` -> `[...,F]`, positive."""
        x = upcast(x)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    @property
    def width(self) -> int:
        """F, features of a head."""
        return 2 * self.shape.key

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": self.mapped(k, self.key_map).to(v.dtype), "v": v}

    def read(
        self, q: Tensor, written: Mapping[str, Tensor], past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, Tensor | None, State]:
        # The same recurrence sums the keys: a column of ones beside the values (MATH.md 1.1).
        k, v = written["k"], F.pad(written["v"], (0, 1), value=1.0)
        q = self.mapped(q, self.query_map).to(v.dtype)
        out, memory = run_grouped(
            sequence, linear_attention, q, k, v, written.get("log_decay"), scale=1.0, past=past.get("memory")
        )
        value, mass = upcast(out).split([out.shape[-1] - 1, 1], -1)
        empty = mass <= 0
        mass = mass.masked_fill(empty, 1.0)
        return value / mass, mass.log().masked_fill(empty, -torch.inf)[..., 0], {"memory": memory}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.shape.groups, self.width), "v": (self.shape.groups, self.shape.key)}

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.groups, self.width, self.shape.key + 1)}

    def flops(self, tokens: int) -> int:
        return linear_attention_flops(tokens, self.shape.heads, self.width, self.shape.key + 1)


class RetNetMemory(Additive):
    """Key head h forgets by the fixed factor `1 - 2 ** (-5 - h)` (arXiv 2307.08621, eq. 8)."""

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        power = 5.0 + torch.arange(self.shape.groups, dtype=torch.float32, device=x.device)
        decay = torch.log1p(-torch.exp2(-power)).expand(*x.shape[:2], -1)
        return super().write(x, k, v) | {"log_decay": decay}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups,)}


class GLAMemory(Additive):
    """Every feature forgets by `sigmoid(W2 W1 x + b) ** (1/16)` (arXiv 2312.06635)."""

    def __init__(self, shape: Heads, rank: int):
        super().__init__(shape)
        self.forget = LowRank(shape.width, rank, shape.groups * self.width, bias=True)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.constant_(self.forget[1].bias, SLOW)  # type: ignore[arg-type]

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = F.logsigmoid(upcast(self.forget(x))) / TEMPERATURE
        return super().write(x, k, v) | {"log_decay": decay.unflatten(2, (self.shape.groups, -1))}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups, self.width)}


class TiedGLAMemory(Additive):
    """Every feature keeps what the key leaves: `a = 1 - phi(k)`, without a matrix (SpikingBrain, arXiv 2509.05276)."""

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        features = self.mapped(k, self.key_map)
        # A softmax of one channel far ahead rounds to 1, whose gate would have no logarithm.
        decay = torch.log1p(-features.clamp(max=1 - 2**-20))
        return {"k": features.to(v.dtype), "v": v, "log_decay": decay}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups, self.width)}


class HGRN2Memory(Additive):
    """`f = sigmoid(k + b) ** (1/16)` is what a channel keeps and `1 - f` what it takes in (arXiv 2404.07904)."""

    maps_keys = False

    def __init__(self, shape: Heads):
        super().__init__(shape)
        self.bias = nn.Parameter(torch.empty(shape.groups * shape.key))
        nn.init.constant_(self.bias, SLOW)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.constant_(self.bias, SLOW)

    def features(self, x: Tensor) -> Tensor:
        return upcast(x).softmax(-1)

    @property
    def width(self) -> int:
        return self.shape.key

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = F.logsigmoid(upcast(k) + self.bias.view(self.shape.groups, -1)) / TEMPERATURE
        return {"k": -torch.expm1(decay).to(v.dtype), "v": v, "log_decay": decay}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups, self.width)}


class StepMemory(Additive):
    """Mamba-2's: `a = exp(-dt A)`, and a key is written dt strong, `dt = softplus(W x + b)` (arXiv 2405.21060)."""

    def __init__(self, shape: Heads):
        super().__init__(shape)
        self.step = Step(shape.width, shape.groups, shape.groups)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self.step.reset_parameters(generator)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay, dt = self.step(x)
        written = super().write(x, k, v)
        return written | {"k": (written["k"] * dt[..., None]).to(v.dtype), "log_decay": decay}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups,)}


class Step(nn.Module):
    """`x -> (-A dt, dt)`, `dt = softplus(W x + b)`: the decay of Mamba-2, and of what followed it."""

    def __init__(self, width: int, rates: int, steps: int):
        super().__init__()
        self.linear = nn.Linear(width, steps, bias=False)
        self.rate_log = nn.Parameter(torch.empty(rates))
        self.bias = nn.Parameter(torch.empty(steps))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        # Rates below 1, where models that are trained from scratch have up to 16: what a memory is for lies far back.
        reset_decay_rate(self.rate_log, generator, low=1e-3, high=1.0)
        reset_step_bias(self.bias, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dt = step_sizes(self.linear(x), self.bias)
        rate = self.rate_log.exp().repeat_interleave(len(self.bias) // len(self.rate_log))
        return -rate * dt, dt


class DeltaMemory(Memory):
    """`S_t = (I - beta k^T k) S_{t-1} + beta k^T v`, q and k of unit length (DeltaNet, arXiv 2406.06484)."""

    def __init__(self, shape: Heads):
        super().__init__(shape)
        self.beta = nn.Linear(shape.width, shape.groups, bias=False)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": l2norm(k), "v": v, "beta": torch.sigmoid(upcast(self.beta(x)))}

    def read(
        self, q: Tensor, written: Mapping[str, Tensor], past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, Tensor | None, State]:
        k, v, beta, decay = written["k"], written["v"], written["beta"], written.get("log_decay")
        out, memory = run_grouped(
            sequence, delta_rule, l2norm(q), k, v, beta, decay, scale=1.0, past=past.get("memory")
        )
        return out, None, {"memory": memory}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        groups, key = self.shape.groups, self.shape.key
        return {"k": (groups, key), "v": (groups, key), "beta": (groups,)}

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.groups, self.shape.key, self.shape.key)}

    def flops(self, tokens: int) -> int:
        return delta_rule_flops(tokens, self.shape.heads, self.shape.key, self.shape.key)


class GatedDeltaMemory(DeltaMemory):
    """The delta rule with Mamba-2's decay, one number a head (Gated DeltaNet, arXiv 2412.06464)."""

    def __init__(self, shape: Heads):
        super().__init__(shape)
        self.step = Step(shape.width, shape.groups, self.decays)

    @property
    def decays(self) -> int:
        """Numbers that forget, all heads together."""
        return self.shape.groups

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self.step.reset_parameters(generator)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return super().write(x, k, v) | {"log_decay": self.step(x)[0]}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups,)}


class KDAMemory(GatedDeltaMemory):
    """A decay for every key channel (Kimi Delta Attention, arXiv 2510.26692)."""

    @property
    def decays(self) -> int:
        return self.shape.groups * self.shape.key

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        written = super().write(x, k, v)
        return written | {"log_decay": written["log_decay"].unflatten(2, (self.shape.groups, -1))}

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().written_shapes() | {"log_decay": (self.shape.groups, self.shape.key)}


class SlotMemory(Memory):
    """Slots of keys and of values that a softmax reads, each forgetting as it is written (GSA, arXiv 2409.07146)."""

    def __init__(self, shape: Heads, slots: int):
        super().__init__(shape)
        self.slots = slots
        self.forget = nn.Linear(shape.width, shape.groups * slots)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        # From slots that turn over in 23 tokens to some that take 600: slow ones alone would stay empty for long.
        with torch.no_grad():
            self.forget.bias.copy_(torch.linspace(0.0, SLOW + 0.6, self.slots).repeat(self.shape.groups))

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        decay = (F.logsigmoid(upcast(self.forget(x))) / TEMPERATURE).unflatten(2, (self.shape.groups, -1))
        return {"k": k, "v": v, "log_decay": decay}

    def read(
        self, q: Tensor, written: Mapping[str, Tensor], past: Mapping[str, Tensor], sequence: SequenceContext
    ) -> tuple[Tensor, Tensor | None, State]:
        out, after = slot_attention(q, written, past, sequence, scale=self.shape.key**-0.5)
        return out, None, after

    def written_shapes(self) -> dict[str, tuple[int, ...]]:
        groups, key = self.shape.groups, self.shape.key
        return {"k": (groups, key), "v": (groups, key), "log_decay": (groups, self.slots)}

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return slot_shapes(batch, self.shape.groups, self.slots, self.shape.key, self.shape.key)

    def flops(self, tokens: int) -> int:
        return slot_flops(tokens, self.shape.heads, self.slots, self.shape.key, self.shape.key)


# By the name of the mixer whose update it is; the arguments are the layer's sizes, gates' rank, and slots.
MEMORIES: Mapping[str, Callable[[Heads, int, int], Memory]] = {
    "linear_attention": lambda shape, rank, slots: Additive(shape),
    "retnet": lambda shape, rank, slots: RetNetMemory(shape),
    "gla": lambda shape, rank, slots: GLAMemory(shape, rank),
    "hgrn2": lambda shape, rank, slots: HGRN2Memory(shape),
    "mamba2": lambda shape, rank, slots: StepMemory(shape),
    "delta_net": lambda shape, rank, slots: DeltaMemory(shape),
    "gated_delta_net": lambda shape, rank, slots: GatedDeltaMemory(shape),
    "kda": lambda shape, rank, slots: KDAMemory(shape),
    "gsa": lambda shape, rank, slots: SlotMemory(shape, slots),
}


def opening(weight: float, *, has_mass: bool) -> float:
    """What makes a memory count `weight` at the start: a logarithm beside a mass, else a sigmoid's input."""
    if weight == 0:
        return -math.inf
    return math.log(weight) if has_mass else math.log(weight / (1 - weight))
