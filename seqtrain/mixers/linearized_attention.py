"""Attention whose far past is a recurrent memory: what softmax attention is converted to.

A window and a document's first tokens stay softmax attention (sinks: StreamingLLM, arXiv 2309.17453); the tokens
between are written to a memory when the window has passed them. The projections are those of `attention`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import delay, sink_attention
from seqtrain.layers import RMSNorm, positions, upcast
from seqtrain.mixers._attention import AttentionConfig, SoftmaxAttention
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, State
from seqtrain.mixers._costs import softmax_attention_flops
from seqtrain.mixers._memories import MEMORIES, Heads, TiedGLAMemory, opening
from seqtrain.parallel.sequence import SequenceContext

MemoryName = Literal[
    "linear_attention", "retnet", "gla", "hgrn2", "gsa", "mamba2", "delta_net", "gated_delta_net", "kda"
]


class LinearizedAttention(SoftmaxAttention):
    """Softmax over window and sinks with the memory of older tokens as one more entry, or beside it as a gated sum.

    `combine=denominator`: the memory's mass, times a learned weight a head, is a term of the softmax's sum; it needs a
    memory that has one. `combine=sum`: `(1 - g) softmax part + g memory`, g learned a head, 0 while the memory is
    empty. The weight's logarithm, or what g is the sigmoid of, is a number plus a linear function of the query.
    `combine=norms`: both parts, each head divided by its root mean square, are added with a weight a channel, as in the
    larger SpikingBrain (arXiv 2509.05276). With `window=0` the memory holds all tokens, the query's own included, and
    is all there is.
    """

    state_dtypes: ClassVar = {"length": torch.int64, "position": torch.int64}

    @dataclass(frozen=True)
    class Config(AttentionConfig):
        # Whose update the memory has: the name of a recurrent mixer.
        memory: MemoryName = "gated_delta_net"
        # Tokens under the softmax, the query's own included; 0: none, the memory holds every token.
        window: Annotated[int, Field(ge=0)] = 64
        # First tokens of a document that stay under the softmax for ever.
        sinks: Annotated[int, Field(ge=0)] = 4
        # How window and memory are joined; auto: under one denominator where the memory has a mass, else as a sum;
        # norms: each normalised by itself, then added.
        combine: Literal["auto", "denominator", "sum", "norms"] = "auto"
        # What the memory counts beside the window before training: a factor on its mass, or its share of the sum.
        memory_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
        # Rank of the matrix that makes gla's forget gate.
        gate_rank: Annotated[int, Field(gt=0)] = 16
        # True: gla's forget gate is 1 - key, without a matrix.
        tied_gate: bool = False
        # Slots of gsa, a head.
        slots: Annotated[int, Field(gt=0)] = 64

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        heads = Heads(shape.width, shape.heads, self.groups, self.key)
        self.memory = MEMORIES[config.memory](heads, config.gate_rank, config.slots)
        if config.tied_gate:
            if config.memory != "gla":
                raise self.config_error("tied_gate", "true", f"is of memory=gla, not memory={config.memory}")
            self.memory = TiedGLAMemory(heads)
        self.shared = self.memory.has_mass and config.combine not in ("sum", "norms")
        if config.combine == "denominator" and not self.memory.has_mass:
            rule = f"memory={config.memory} has no mass to share a denominator; use combine=sum"
            raise self.config_error("combine", config.combine, rule)
        normed = config.combine == "norms"
        # What the memory counts: a number a head, and how it follows the query, as a softmax's own mass does.
        self.opening = nn.Parameter(torch.empty(shape.heads)) if config.window and not normed else None
        # In one dimension, as all that weight decay leaves alone.
        self.opening_slope = nn.Parameter(torch.empty(shape.heads * self.key)) if self.opening is not None else None
        self.memory_norm = RMSNorm(self.key, config.norm_eps) if normed else nn.Identity()
        self.window_norm = RMSNorm(self.key, config.norm_eps) if normed and config.window else nn.Identity()
        # What an ablation leaves out: a part's name, or nothing.
        self.without: Literal["", "memory", "window"] = ""
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.memory.reset_parameters(generator)
        if self.opening is not None:
            nn.init.constant_(self.opening, opening(self.config.memory_weight, has_mass=self.shared))
        if self.opening_slope is not None:
            nn.init.zeros_(self.opening_slope)
        if isinstance(self.memory_norm, RMSNorm):
            nn.init.constant_(self.memory_norm.weight, self.config.memory_weight if self.config.window else 1.0)
        if isinstance(self.window_norm, RMSNorm):
            nn.init.ones_(self.window_norm.weight)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        q, k, v = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        after = {"position": position}
        older = place >= self.config.window + self.config.sinks if self.config.window else None  # B|1 T
        written = self.memory.write(x, k, v)
        if older is not None:
            written = self._delayed(written, older, past, after, sequence)
        value, mass, memory = self.memory.read(q, written, past, sequence)
        after |= memory
        if older is None:
            out = torch.zeros_like(value) if self.without == "memory" else self.memory_norm(value)
        else:
            near = self.rotated(q, place), self.rotated(k, place), v
            out = self._with_window(near, value, mass, self._opened(q), older, past, after, sequence)
        return self.out(out.to(x.dtype).flatten(2)), after

    def _opened(self, q: Tensor) -> Tensor | None:
        """What the memory counts for each query of `q: [B,T,H,K]`: `[B,T,H]`."""
        if self.opening is None or self.opening_slope is None:
            return None
        slope = upcast(self.opening_slope).unflatten(0, (-1, self.key))  # H K
        return upcast(self.opening) + torch.einsum("bthk,hk->bth", upcast(q), slope)

    def _delayed(
        self,
        written: dict[str, Tensor],
        older: Tensor,
        past: Mapping[str, Tensor],
        after: State,
        sequence: SequenceContext,
    ) -> dict[str, Tensor]:
        """What the token just behind the window writes; nothing where there is none or it is a sink."""
        passed = {}
        for name, tensor in written.items():
            late, after[f"near_{name}"] = sequence.run(
                delay, tensor, by=self.config.window, initial_state=past.get(f"near_{name}")
            )
            passed[name] = late * older.view(*older.shape, *[1] * (late.dim() - 2))
        return passed

    def _with_window(
        self,
        near: tuple[Tensor, Tensor, Tensor],
        value: Tensor,
        mass: Tensor | None,
        opened: Tensor | None,
        older: Tensor,
        past: Mapping[str, Tensor],
        after: State,
        sequence: SequenceContext,
    ) -> Tensor:
        """Softmax over window and sinks, joined with what the memory gave."""
        held = {key: past[key] for key in ("k", "v", "sink_k", "sink_v", "length") if key in past}
        extra: tuple[Tensor, Tensor] | tuple[()] = ()
        if self.shared and self.without != "memory":
            assert mass is not None
            assert opened is not None
            extra = mass + opened, value.to(mass.dtype)
        out, kept = sequence.run(
            sink_attention,
            *near,
            *extra,
            window=self.config.window,
            sinks=self.config.sinks,
            initial_state=held or None,
        )
        after |= kept
        out, value = self.window_norm(out), self.memory_norm(value.to(out.dtype))
        if self.without == "window":
            return value * older[..., None, None]
        if self.shared or self.without == "memory":
            return out
        if opened is None:
            return out + value
        gate = (torch.sigmoid(opened) * older[..., None])[..., None].to(out.dtype)  # B T H 1
        return out + gate * (value - out)

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        shapes = {"position": (batch,)} | self.memory.state_shapes(batch)
        if not self.config.window:
            return shapes
        window, row = self.config.window, (self.groups, self.key)
        for name, shape in self.memory.written_shapes().items():
            shapes[f"near_{name}"] = (batch, window, *shape)
        kept, sinks = (batch, window - 1, *row), (batch, self.config.sinks, *row)
        return shapes | {"k": kept, "v": kept, "sink_k": sinks, "sink_v": sinks, "length": (batch,)}

    def weights(self) -> tuple[int, int]:
        matrices, others = super().weights()
        more, rest = self.memory.weights()
        joining = (self.opening, *self.memory_norm.parameters(), *self.window_norm.parameters())
        slope = 0 if self.opening_slope is None else self.opening_slope.numel()
        return matrices + more + slope, others + rest + sum(part.numel() for part in joining if part is not None)

    def operator_flops(self, tokens: int) -> int:
        recurrent = self.memory.flops(tokens)
        if not self.config.window:
            return recurrent
        seen = self.config.window + self.config.sinks
        return recurrent + softmax_attention_flops(tokens, self.shape.heads, self.key, self.key, seen)
