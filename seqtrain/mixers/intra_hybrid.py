"""Linear, windowed and full attention side by side in one layer: SpikingBrain's intra-layer hybrid (arXiv 2509.05276).

All branches read the same queries, keys and values, so that a softmax layer's weights serve each of them. Every
branch's heads are normalised before the sum, as in Hymba (arXiv 2411.13676): their sizes differ, and drift apart as a
sequence grows.
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.layers import HeadNorm, HeadProjections, LowRank, log_forget, positions, rotate
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend


class IntraHybrid(Mixer):
    """`y = W (norm(gated linear attention) + norm(attention in a window) [+ norm(full attention)])` of one q, k, v.

    The linear branch forgets as GLA does, or with `tied_gate` what a key makes room for, and knows no positions; the
    softmax branches rotate q and k by them.
    """

    class Config(MixerConfig):
        # Tokens a query sees in the windowed branch, its own included.
        window: PositiveInt = 512
        # True: a third branch sees all tokens before; its state, all keys and values, grows.
        full: bool = False
        # Rank of the matrix that makes the linear branch's forget gate.
        gate_rank: PositiveInt = 16
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: PositiveFloat = 16.0
        # True: the forget gate is 1 - key, sigmoids of the keys both, without a matrix; the larger SpikingBrain's.
        tied_gate: bool = False
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.even_part_of_width()
        self.windows: list[int | None] = [config.window, *([None] if config.full else [])]
        self.qkv = HeadProjections(shape.width, shape.heads, (self.head,) * 3)
        self.forget = None if config.tied_gate else LowRank(shape.width, config.gate_rank, shape.channels, bias=True)
        self.norms = nn.ModuleList(HeadNorm(self.head) for _ in range(1 + len(self.windows)))
        self.out = self.output(shape.channels)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        after: State = {}
        (q, k, v), _ = self.qkv(x, None, sequence)
        raw = -k if self.forget is None else self.forget(x).unflatten(2, (self.shape.heads, self.head))
        log_decay = log_forget(raw, self.config.gate_temperature)
        written = k if self.forget is not None else -torch.expm1(log_decay).to(k.dtype)
        out, after["memory"] = sequence.run(
            linear_attention, q, written, v, log_decay, initial_state=past.get("memory")
        )
        mixed = self.norms[0](out)
        place, after["position"] = positions(x, past.get("position"), sequence)
        q, k = (rotate(part, place, self.config.rope_base) for part in (q, k))
        for prefix, window, norm in zip(("", "full_"), self.windows, self.norms[1:], strict=False):
            out, kept = attend(sequence, softmax_attention, q, k, v, past=past, prefix=prefix, window=window)
            after |= kept
            mixed = mixed + norm(out)
        return self.out(mixed), after
