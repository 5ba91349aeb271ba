"""TransNormer ("The Devil in Linear Transformer", 2022, arXiv 2210.10340): DiagAttention below, NormAttention above."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, HeadProjections, positions, rotate
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend


class TransNormer(Mixer):
    """Linear attention whose outputs are normalised, not its weights; softmax within blocks of tokens in lower layers.

    NormAttention: `out_t = norm(sum_{j<=t} (phi(q_t) . phi(k_j)) v_j)`; a norm's gradients are bounded by its epsilon,
    those of weights divided by their sum are not. DiagAttention: softmax over the tokens of t's block up to t, since a
    linear attention spreads its weights too thin to see what is near. Queries and keys of both are rotated by position.
    """

    class Config(MixerConfig):
        # Share of the model's layers, counted from the first, that are DiagAttention.
        diag_share: Annotated[float, Field(ge=0, le=1)] = 0.5
        # Tokens of a block of DiagAttention; blocks are counted from a document's start.
        block: PositiveInt = 64
        # What queries and keys of NormAttention pass through: elu (elu + 1) or relu.
        feature_map: Literal["elu", "relu"] = "elu"
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = self.even_part_of_width()
        self.diagonal = shape.index < config.diag_share * shape.depth
        self.feature_map = FEATURE_MAPS[config.feature_map][0]
        self.qkv = HeadProjections(shape.width, shape.heads, 3 * (self.head,))
        self.grouped = self.diagonal
        self.norm = None if self.diagonal else HeadNorm(self.head)
        self.out = self.output(shape.channels)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), _ = self.qkv(x, None, sequence)
        seen = past.get("position")
        place, position = positions(x, seen, sequence)
        if self.norm is None:
            q, k = (rotate(part, place, self.config.rope_base) for part in (q, k))
            blocks = sequence.grouped(self.config.block, seen)
            out, after = attend(blocks, softmax_attention, q, k, v, past=past, window=None)
            return self.out(out.flatten(2)), after | {"position": position}
        q, k = (rotate(self.feature_map(part), place, self.config.rope_base) for part in (q, k))
        out, memory = sequence.run(linear_attention, q, k, v, initial_state=past.get("memory"))
        return self.out(self.norm(out)), {"memory": memory, "position": position}
