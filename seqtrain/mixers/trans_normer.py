"""TransNormer ("The Devil in Linear Transformer", 2022, arXiv 2210.10340): DiagAttention below, NormAttention above.

As T2 in its authors' code. T1 has elu without the one (`feature_map=plain_elu`) and, which is not here, relu in place
of softmax within blocks. The rotation pairs other channels, which a permutation of weights undoes.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, computed, initialize
from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, HeadProjections, WidthNorm, positions, rotation_rates, turn
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend


class TransNormer(Mixer):
    """Linear attention whose outputs are normalised, not its weights; softmax within blocks of tokens in lower layers.

    NormAttention: `out_t = norm(sum_{j<=t} (phi(q_t) . phi(k_j)) v_j)`; a norm's gradients are bounded by its epsilon,
    those of weights divided by their sum are not. DiagAttention: softmax over the tokens of t's block up to t, since a
    linear attention spreads its weights too thin to see what is near. Queries and keys of both are rotated by position,
    at rates that are learned.
    """

    class Config(MixerConfig):
        # Share of the model's layers, counted from the first, that are DiagAttention.
        diag_share: Annotated[float, Field(ge=0, le=1)] = 0.5
        # Tokens of a block of DiagAttention; blocks are counted from a document's start.
        block: PositiveInt = 64
        # What queries and keys of NormAttention pass through: elu (elu + 1, T2), plain_elu (T1) or relu.
        feature_map: Literal["elu", "plain_elu", "relu"] = "elu"
        # What a norm is taken over: all heads together, without weights as in the paper, or each head, with weights.
        norm_over: Literal["width", "head"] = "width"
        # True: the rotation's rates are learned, from those of rope_base, in each layer (all heads share them).
        learned_angles: bool = True
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.even_part_of_width()
        self.diagonal = shape.index < config.diag_share * shape.depth
        self.feature_map = FEATURE_MAPS[config.feature_map][0]
        self.qkv = HeadProjections(shape.width, shape.heads, 3 * (self.head,))
        self.grouped = self.diagonal
        self.norm: nn.Module | None = None
        if not self.diagonal:
            wide = WidthNorm(shape.channels, learned=False, tensor=shape.tensor)
            self.norm = wide if config.norm_over == "width" else HeadNorm(self.head)
        self.rates = nn.Parameter(torch.empty(self.head // 2)) if config.learned_angles else None
        self.out = self.output(shape.channels)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        if self.rates is None:
            return {}
        return {self.rates: computed(lambda: rotation_rates(self.head, self.config.rope_base))}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), _ = self.qkv(x, None, sequence)
        seen = past.get("position")
        place, position = positions(x, seen, sequence)
        if not self.diagonal:
            q, k = self.feature_map(q), self.feature_map(k)
        rates = (
            rotation_rates(self.head, self.config.rope_base, x.device) if self.rates is None else self.rates.double()
        )
        q, k = (turn(part, place[..., None, None] * rates) for part in (q, k))
        if not self.diagonal:
            out, memory = sequence.run(linear_attention, q, k, v, initial_state=past.get("memory"))
            after = {"memory": memory}
        else:
            blocks = sequence.grouped(self.config.block, seen)
            out, after = attend(blocks, softmax_attention, q, k, v, past=past, window=None)
        out = out.flatten(2) if self.norm is None else self.norm(out).to(x.dtype)
        return self.out(out), after | {"position": position}
