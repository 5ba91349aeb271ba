"""Attention whose far past is a recurrent memory: what softmax attention is converted to.

A window and a document's first tokens stay softmax attention (sinks: StreamingLLM, arXiv 2309.17453); the tokens
between are written to a memory when the window has passed them. The projections are those of `attention`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import delay, sink_attention
from seqtrain.layers import RMSNorm, positions, upcast
from seqtrain.mixers import MIXERS, LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.attention import SoftmaxAttention, attend
from seqtrain.mixers.common.recurrence import FeatureMap, Heads, LinearRecurrence, Recurrence, RecurrenceOptions


def recurrent_mixers() -> list[str]:
    """The mixers whose recurrence can be a memory."""
    return [name for name in MIXERS.names if MIXERS.get(name).recurrence is not None]


def recurrence_of(name: str) -> type[Recurrence]:
    """The recurrence of the mixer `name`. Raises `ConfigError` that lists those that have one."""
    found = MIXERS.get(name).recurrence
    if found is None:
        raise ConfigError(f"mixer {name} offers no recurrence; those that do: {', '.join(recurrent_mixers())}")
    return found


@dataclass(frozen=True)
class MemoryConfig:
    """The fields of a memory next to a window, which a conversion takes over."""

    # Tokens under the softmax, the query's own included; 0: none, the memory holds every token.
    window: NonNegativeInt = 64
    # First tokens of a document that stay under the softmax for ever.
    sinks: NonNegativeInt = 4
    # How window and memory are joined; auto: under one denominator where the memory has a normalizer, else as a sum;
    # norms: each normalised by itself, then added (SpikingBrain).
    combine: Literal["auto", "denominator", "sum", "norms"] = "auto"
    # What the memory counts before training: a factor on its normalizer, or its share of the sum.
    memory_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Rank of the matrix that makes gla's forget gate.
    gate_rank: PositiveInt = 16
    # True: gla's forget gate is 1 - key, without a matrix (SpikingBrain's tied gate).
    tied_gate: bool = False
    # What the memory makes features of queries and keys by, where it has any: hedgehog (two softmaxes of a learned
    # matrix a head), relu or sigmoid (without weights, as the smaller and the larger SpikingBrain).
    feature_map: FeatureMap = "hedgehog"
    # Slots of gsa per head.
    slots: PositiveInt = 64


class LinearizedAttention(SoftmaxAttention):
    """Softmax over window and sinks with the memory of older tokens as one more entry, or next to it as a gated sum.

    `combine=denominator`: the memory's normalizer, times a learned weight per head, is a term of the softmax's sum.
    `combine=sum`: `(1 - g) softmax part + g memory`, g learned per head, 0 while the memory is empty. The weight's
    logarithm, or what g is the sigmoid of, is a number plus a linear function of the query. `combine=norms`: both
    parts, each head divided by its root mean square, are added with a weight per channel, as in the larger SpikingBrain
    (arXiv 2509.05276). With `window=0` the memory holds all tokens, the query's own included, and is all there is.
    """

    class Config(MemoryConfig, SoftmaxAttention.Config):
        # Whose recurrence the memory has: the name of a mixer that offers one.
        memory: str = "gated_delta_net"

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        # The memory of a key head isn't divided.
        shape.share(self.all_groups, f"{self.all_groups} key heads with a memory")
        self.memory = self._recurrence()(
            Heads(shape.width, shape.heads, self.groups, self.key, shape.tensor),
            RecurrenceOptions(gate_rank=config.gate_rank, slots=config.slots, feature_map=config.feature_map),
        )
        self.shared = self.memory.has_normalizer and config.combine not in ("sum", "norms")
        if config.combine == "denominator" and not self.memory.has_normalizer:
            rule = f"memory={config.memory} has no normalizer to share a denominator; use combine=sum"
            raise self.config_error("combine", config.combine, rule)
        normed = config.combine == "norms"
        # What the memory counts: a number per head, and how it follows the query, as a softmax's own normalizer does.
        self.opening = nn.Parameter(torch.empty(shape.heads)) if config.window and not normed else None
        # One-dimensional, so that weight decay skips it.
        self.opening_slope = nn.Parameter(torch.empty(shape.heads * self.key)) if self.opening is not None else None
        self.memory_norm = RMSNorm(self.key, config.norm_eps) if normed else nn.Identity()
        self.window_norm = RMSNorm(self.key, config.norm_eps) if normed and config.window else nn.Identity()
        initialize(self)
        initialize(self.memory)

    def _recurrence(self) -> type[Recurrence]:
        found, chosen = recurrence_of(self.config.memory), self.config.feature_map
        if chosen != "hedgehog" and not (issubclass(found, LinearRecurrence) and found.maps_keys):
            rule = f"memory={self.config.memory} makes no such features; memory=gla does"
            raise self.config_error("feature_map", chosen, rule)
        if self.config.tied_gate and chosen == "relu":
            raise self.config_error("feature_map", chosen, "tied_gate=true needs keys below 1; use sigmoid")
        if not self.config.tied_gate:
            return found
        if found.tied is None:
            rule = f"memory={self.config.memory} has no tied gate; memory=gla has one"
            raise self.config_error("tied_gate", "true", rule)
        return found.tied

    def initializers(self) -> dict[Tensor, Initializer]:
        weight = self.config.memory_weight
        found: dict[Tensor, Initializer] = {}
        if self.opening is not None and self.opening_slope is not None:
            # The logarithm of a factor on the normalizer, or what a share of the sum is the sigmoid of.
            odds = weight if self.shared else weight / (1 - weight)
            found = {self.opening: constant(math.log(odds) if odds else -math.inf), self.opening_slope: constant(0.0)}
        for norm, value in ((self.memory_norm, weight if self.config.window else 1.0), (self.window_norm, 1.0)):
            if isinstance(norm, RMSNorm):
                found[norm.weight] = constant(value)
        return found

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        q, k, v, *gate = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        written = self.memory.write(x, k, v)
        if not self.config.window:
            value, _, after = self.memory.read(q, written, past, sequence)
            out = torch.zeros_like(value) if self.without == "memory" else self.memory_norm(value)
            return self.read_out(out.to(x.dtype), gate), after | {"position": position}
        older = place >= self.config.window + self.config.sinks  # B|1 T
        written, delayed = self._delayed(written, older, past, sequence)
        value, normalizer, after = self.memory.read(q, written, past, sequence)
        weight = self._weight(q)
        extra: tuple[Tensor, ...] = ()
        if self.shared and self.without != "memory":
            assert normalizer is not None
            assert weight is not None
            extra = normalizer + weight, value.to(normalizer.dtype)
        near = self.rotated(q, place), self.rotated(k, place), v, *extra
        window, sinks = self.config.window, self.config.sinks
        out, kept = attend(sequence, sink_attention, *near, past=past, window=window, sinks=sinks)
        out = self._joined(out, value, weight, older)
        return self.out(out.to(x.dtype).flatten(2)), delayed | after | kept | {"position": position}

    def _weight(self, q: Tensor) -> Tensor | None:
        """What the memory counts for each query of `q: [B,T,H,K]`: `[B,T,H]`."""
        if self.opening is None or self.opening_slope is None:
            return None
        slope = upcast(self.opening_slope).unflatten(0, (-1, self.key))  # H K
        return upcast(self.opening) + torch.einsum("bthk,hk->bth", upcast(q), slope)

    def _delayed(self, written: Past, older: Tensor, past: Past, sequence: SequenceContext) -> tuple[State, State]:
        """What the token just past the window writes (nothing where there is none or it is a sink), and the state."""
        passed, after = {}, {}
        for name, tensor in written.items():
            held = past.get(f"near_{name}")
            late, after[f"near_{name}"] = sequence.run(delay, tensor, by=self.config.window, initial_state=held)
            passed[name] = late * older.view(*older.shape, *[1] * (late.dim() - 2))
        return passed, after

    def _joined(self, out: Tensor, value: Tensor, weight: Tensor | None, older: Tensor) -> Tensor:
        """The softmax's `out` and the memory's `value`, `[B,T,H,K]`, as one."""
        out, value = self.window_norm(out), self.memory_norm(value.to(out.dtype))
        if self.without == "window":
            return value * older[..., None, None]
        if self.shared or self.without == "memory":
            return out
        if weight is None:
            return out + value
        gate = (torch.sigmoid(weight) * older[..., None])[..., None].to(out.dtype)  # B T H 1
        return out + gate * (value - out)
