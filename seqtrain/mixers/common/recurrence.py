"""Recurrences that read and write with an attention layer's own queries, keys and values.

They are what a converted layer keeps of tokens its window has passed (or of all tokens). Each is the update of a mixer,
which names it as its `recurrence`; where that mixer has projections of its own for q, k and v, this takes the
attention's. Keys, values and states are one for each key head, however many query heads share it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, decay_rate, initialize, normal, step_bias
from seqtrain.kernels import linear_attention, slot_scores
from seqtrain.layers import FEATURE_MAPS, Linear, step_sizes, upcast
from seqtrain.parallel.sequence import SequenceContext, State
from seqtrain.parallel.tensor import ALONE, TensorParallel

FeatureMap = Literal["hedgehog", "relu", "sigmoid"]
# What a layer knows of the tokens before, by name.
Past = Mapping[str, Tensor]
# What queries read, `[B,T,H,K]`, the logarithm of its normalizer, `[B,T,H]`, where there is one, and the state.
Reading = tuple[Tensor, Tensor | None, State]


@dataclass(frozen=True)
class Heads:
    """An attention layer's sizes: D, H query heads, G key heads, K channels per head (of q, k and v alike).

    `tensor`: ranks over which heads are divided; those here are this rank's.
    """

    width: int
    heads: int
    groups: int
    key: int
    tensor: TensorParallel = ALONE


@dataclass(frozen=True)
class RecurrenceOptions:
    """What a conversion can choose of a recurrence, and where its gates start: slow, as the far past is what it is for.

    A gate at `gate_bias` forgets half in 230 tokens. Mixers trained from scratch have their own, faster values.
    """

    # Rank of the matrix that makes GLA's forget gate.
    gate_rank: int = 16
    # GSA's slots per head.
    slots: int = 64
    # What positive features are made of queries and keys by, see `LinearRecurrence`.
    feature_map: FeatureMap = "hedgehog"
    # Forget gates are sigmoids to the power 1 / temperature: GLA's, for all that have one.
    temperature: float = 16.0
    # What the sigmoids are of at the start, the weights aside.
    gate_bias: float = 3.0
    # Initial rates of what forgets by step sizes; models trained from scratch have up to 16.
    rates: tuple[float, float] = (1e-3, 1.0)


class Recurrence(nn.Module):
    """Maps what tokens write, `[B,T,G,...]`, and queries `[B,T,H,K]` to what the queries read, `[B,T,H,K]`.

    What is read has the size of a value. A token whose written tensors are all zero leaves the state as it is.
    """

    # Whether it knows how much it holds for a query: then it can be one more term of a softmax.
    has_normalizer: ClassVar[bool] = False
    # The form whose forget gate is 1 - key, without a matrix; None where there is none.
    tied: ClassVar["type[Recurrence] | None"] = None

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__()
        self.heads = heads
        self.options = options

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What each token writes, from the layer's input `[B,T,D]`, keys and values `[B,T,G,K]` (not rotated)."""
        raise NotImplementedError

    def read(self, q: Tensor, written: Past, past: Past, sequence: SequenceContext) -> Reading:
        """What `q: [B,T,H,K]` reads of what was `written`, its own tokens' included."""
        raise NotImplementedError

    def initializers(self) -> dict[Tensor, Initializer]:
        """Of every parameter but a child's own: small matrices, and gates that forget slowly."""
        return {module.weight: normal(0.02) for module in self.modules() if isinstance(module, nn.Linear)}


class LinearRecurrence(Recurrence):
    """`S_t = diag(a_t) S_{t-1} + phi(k_t)^T v_t` over its normalizer `phi(q_t) . z_t`; phi is positive.

    phi(x) = [softmax(W x), softmax(-W x)] (Hedgehog, arXiv 2402.04347), W a learned square matrix for each head of the
    queries and of the keys, at the start the identity. With `feature_map=relu` or `sigmoid` phi is that function and
    has no weights (SpikingBrain, arXiv 2509.05276). Without a decay: linear attention.
    """

    has_normalizer = True
    # False where what a key writes is not its features.
    maps_keys: ClassVar[bool] = True

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        learned = options.feature_map == "hedgehog"
        # Of a head.
        self.feature_count = heads.key * (2 if learned else 1)
        self.query_map = nn.Parameter(torch.empty(heads.heads, heads.key, heads.key)) if learned else None
        maps_keys = learned and self.maps_keys
        self.key_map = nn.Parameter(torch.empty(heads.groups, heads.key, heads.key)) if maps_keys else None

    def initializers(self) -> dict[Tensor, Initializer]:
        maps = [each for each in (self.query_map, self.key_map) if each is not None]
        width = self.heads.key
        return super().initializers() | dict.fromkeys(maps, computed(lambda: torch.eye(width)))

    def mapped(self, x: Tensor, maps: Tensor | None) -> Tensor:
        """The features of `x: [B,T,heads,K]` times a matrix `[heads,K,K]` for each head."""
        return self.features(x if maps is None else torch.einsum("bthk,hkj->bthj", upcast(x), upcast(maps)))

    def features(self, x: Tensor) -> Tensor:
        """`[...,K]` -> `[...,feature_count]`, none negative."""
        x = upcast(x)
        if self.options.feature_map != "hedgehog":
            return FEATURE_MAPS[self.options.feature_map][0](x)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": self.mapped(k, self.key_map).to(v.dtype), "v": v}

    def read(self, q: Tensor, written: Past, past: Past, sequence: SequenceContext) -> Reading:
        # The same recurrence sums the keys: a column of ones next to the values (docs/math.md, section 1.1).
        k, v = written["k"], F.pad(written["v"], (0, 1), value=1.0)
        q = self.mapped(q, self.query_map).to(v.dtype)
        out, memory = run_grouped(
            sequence, linear_attention, q, k, v, written.get("log_decay"), scale=1.0, past=past.get("memory")
        )
        value, normalizer = upcast(out).split([out.shape[-1] - 1, 1], -1)
        empty = normalizer <= 0
        normalizer = normalizer.masked_fill(empty, 1.0)
        return value / normalizer, normalizer.log().masked_fill(empty, -torch.inf)[..., 0], {"memory": memory}


class StepDecay(nn.Module):
    """`x -> (-A dt, dt)`, `dt = softplus(W x + b)`: the decay of Mamba-2, and of what followed it."""

    def __init__(self, width: int, rates: int, steps: int, options: RecurrenceOptions):
        super().__init__()
        self.options = options
        self.linear = Linear(width, steps, bias=False)
        self.rate_log = nn.Parameter(torch.empty(rates))
        self.bias = nn.Parameter(torch.empty(steps))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.rate_log: decay_rate(*self.options.rates), self.bias: step_bias()}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dt = step_sizes(self.linear(x), self.bias)
        rate = self.rate_log.exp().repeat_interleave(len(self.bias) // len(self.rate_log))
        return -rate * dt, dt


def run_grouped(
    sequence: SequenceContext, operator: Callable, q: Tensor, *written: Tensor | None, scale: float, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`operator` with every key head's tensors and state used by its query heads; the state is one per key head."""
    assert written[0] is not None
    repeat = q.shape[2] // written[0].shape[2]
    if repeat == 1:
        return sequence.run(operator, q, *written, scale=scale, initial_state=past)
    # Heads, not rows: query heads h*R ... h*R + R - 1 share key head h.
    each = [None if tensor is None else tensor.repeat_interleave(repeat, 2) for tensor in written]
    state = None if past is None else past.repeat_interleave(repeat, 1)
    out, state = sequence.run(operator, q, *each, scale=scale, initial_state=state)
    return out, state[:, ::repeat].contiguous()


def slot_attention(
    q: Tensor, written: Past, past: Past, sequence: SequenceContext, *, scale: float
) -> tuple[Tensor, State]:
    """GSA's two passes. `q: [B,T,H,K]`; k `[B,T,G,K]`, v `[B,T,G,V]`, log_decay `[B,T,G,M]` -> `[B,T,H,V]`, state.

    Slot m holds `K_t[m] = a_t[m] K_{t-1}[m] + (1 - a_t[m]) k_t`, `V_t[m]` likewise; `o_t = softmax(scale q_t K_t) V_t`.
    """
    k, v, decay = written["k"], written["v"], written["log_decay"]
    taken = -torch.expm1(decay).to(v.dtype)
    scores, keys = run_grouped(sequence, slot_scores, q, k, taken, decay, scale=scale, past=past.get("slot_keys"))
    weights = upcast(scores).softmax(-1).to(v.dtype)
    out, values = run_grouped(
        sequence, linear_attention, weights, taken, v, decay, scale=1.0, past=past.get("slot_values")
    )
    return out, {"slot_keys": keys, "slot_values": values}
