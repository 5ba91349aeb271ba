"""Linear, windowed and full attention side by side in one layer: SpikingBrain's intra-layer hybrid (arXiv 2509.05276).

All branches read the same queries, keys and values, so that a softmax layer's weights serve each of them. Every
branch's heads are normalised before the sum, as in Hymba (arXiv 2411.13676): their sizes differ, and drift apart as a
sequence grows.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.layers import HeadNorm, HeadProjections, LowRank, positions, rotate, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import linear_attention_flops, softmax_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class IntraHybrid(Mixer):
    """`y = W (norm(gated linear attention) + norm(attention in a window) [+ norm(full attention)])` of one q, k, v.

    The linear branch forgets as GLA does, or with `tied_gate` what a key makes room for, and knows no positions; the
    softmax branches rotate q and k by them.
    """

    state_dtypes: ClassVar = dict.fromkeys(("length", "full_length", "position"), torch.int64)

    @dataclass(frozen=True)
    class Config:
        # Tokens a query sees in the windowed branch, its own included.
        window: Annotated[int, Field(gt=0)] = 512
        # True: a third branch sees all tokens before; its state, all keys and values, grows.
        full: bool = False
        # Rank of the matrix that makes the linear branch's forget gate.
        gate_rank: Annotated[int, Field(gt=0)] = 16
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: Annotated[float, Field(gt=0)] = 16.0
        # True: the forget gate is 1 - key, sigmoids of the keys both, without a matrix; the larger SpikingBrain's.
        tied_gate: bool = False
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.part_of_width()
        if self.head % 2:
            rule = f"model.width/model.heads={self.head} must be even for the rotation of positions"
            raise self.config_error("rope_base", config.rope_base, rule)
        self.constant_state = not config.full
        self.windows: list[int | None] = [config.window, *([None] if config.full else [])]
        self.qkv = HeadProjections(shape.width, shape.heads, (self.head,) * 3)
        self.forget = None if config.tied_gate else LowRank(shape.width, config.gate_rank, shape.width, bias=True)
        self.norms = nn.ModuleList(HeadNorm(self.head) for _ in range(1 + len(self.windows)))
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past, after = state or EMPTY, {}
        (q, k, v), _ = self.qkv(x, None, sequence)
        written, log_decay = self._gated(x, k)
        out, after["memory"] = sequence.run(
            linear_attention, q, written, v, log_decay, initial_state=past.get("memory")
        )
        mixed = self.norms[0](out)
        place, after["position"] = positions(x, past.get("position"), sequence)
        q, k = (rotate(part, place, self.config.rope_base) for part in (q, k))
        for prefix, window, norm in zip(("", "full_"), self.windows, self.norms[1:], strict=False):
            seen = {name: past[prefix + name] for name in ("k", "v", "length") if prefix + name in past}
            out, kept = sequence.run(softmax_attention, q, k, v, window=window, initial_state=seen or None)
            after |= {prefix + name: value for name, value in kept.items()}
            mixed = mixed + norm(out)
        return self.out(mixed), after

    def _gated(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The key as the linear branch writes it, and the logarithm of what it keeps, both `[B,T,H,K]`."""
        raw = -k if self.forget is None else self.forget(x).unflatten(2, (self.shape.heads, self.head))
        log_decay = F.logsigmoid(upcast(raw)) / self.config.gate_temperature
        # 1 - a without cancellation.
        return (k if self.forget is not None else -torch.expm1(log_decay).to(k.dtype)), log_decay

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        heads = (self.shape.heads, self.head)
        shapes: dict[str, tuple[int, ...]] = {"memory": (batch, *heads, self.head), "position": (batch,)}
        for prefix, window in zip(("", "full_"), self.windows, strict=False):
            rows = (batch, tokens if window is None else window - 1, *heads)
            shapes |= {f"{prefix}k": rows, f"{prefix}v": rows, f"{prefix}length": (batch,)}
        return shapes

    def weights(self) -> tuple[int, int]:
        width = self.shape.width
        gate, bias = (0, 0) if self.forget is None else (2 * self.config.gate_rank * width, width)
        return 4 * width * width + gate, bias + len(self.norms) * self.head

    def operator_flops(self, tokens: int) -> int:
        sizes = (tokens, self.shape.heads, self.head, self.head)
        softmax = sum(softmax_attention_flops(*sizes, tokens if window is None else window) for window in self.windows)
        return linear_attention_flops(*sizes) + softmax
