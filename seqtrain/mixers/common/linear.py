"""What linear attentions share that correct plain ones; each adds its feature map, normalizer or gates."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadProjections, upcast
from seqtrain.mixers.common.base import LayerShape, Mixer, MixerConfig, SequenceContext


def sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None,
    sequence: SequenceContext,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sum_j s_tj v_j` `[B,T,H,V]` and `sum_j s_tj` `[B,T,H,1]` over j <= t, in float32 at least, and the state.

    `s_tj = scale * q_t . k_j`, decayed. The sum of weights is a count where q and k are ones, which bfloat16 would
    round.
    """
    columns = F.pad(upcast(v), (0, 1), value=1.0)
    out, state = sequence.run(linear_attention, q, k, columns, log_decay, scale=scale, initial_state=past)
    return out[..., :-1], out[..., -1:], state


class ProjectedMixer(Mixer):
    """The widths of heads and the projections of (convolved) q, k and v."""

    class Config(MixerConfig):
        # Key channels over model.width, all heads together.
        expand_key: PositiveFloat = 1.0
        # Value channels over model.width, all heads together.
        expand_value: PositiveFloat = 1.0
        # Tokens under the short convolution of q, k and v; 0: none.
        conv_width: Annotated[int, Field(ge=0, le=16)] = 4

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key, self.value = self.sizes()
        self.inner = shape.heads * self.value
        heads = self.key_heads, self.key_heads, shape.heads
        self.qkv = HeadProjections(shape.width, heads, self.head_widths(), conv_width=config.conv_width)

    def sizes(self) -> tuple[int, int]:
        """Channels of a key head and of a value head."""
        config = self.config
        key = self.part_of_width(config.expand_key, "expand_key")
        return key, self.part_of_width(config.expand_value, "expand_value")

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys; those of values are the layer's."""
        return self.shape.heads

    def head_widths(self) -> tuple[int, int, int]:
        """Channels per head of q, k and v."""
        return self.key, self.key, self.value


class LinearMixer(ProjectedMixer):
    """Linear attention on convolved q, k and v."""

    def __init__(self, config: ProjectedMixer.Config, shape: LayerShape):
        super().__init__(config, shape)
        self.out = self.output(self.inner)
