"""What linear attentions share that correct plain ones; each adds its feature map, normalizer or gates."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadProjections, ShortConvolution, positions, rotate, upcast
from seqtrain.mixers.common.base import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


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
        self.qkv = HeadProjections(
            shape.width, heads, self.head_widths(), conv_width=config.conv_width, activate=self.activated()
        )

    def sizes(self) -> tuple[int, int]:
        """Channels of a key head and of a value head."""
        config = self.config
        key = self.part_of_width(config.expand_key, "expand_key")
        return key, self.part_of_width(config.expand_value, "expand_value")

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys; those of values are the layer's."""
        return self.shape.heads

    def activated(self) -> bool:
        """Whether q, k and v pass through SiLU where no convolution applies it."""
        return False

    def head_widths(self) -> tuple[int, int, int]:
        """Channels per head of q, k and v."""
        return self.key, self.key, self.value


class LinearMixer(ProjectedMixer):
    """Linear attention on convolved q, k and v."""

    def __init__(self, config: ProjectedMixer.Config, shape: LayerShape):
        super().__init__(config, shape)
        self.out = self.output(self.inner)


class VisionLinearMixer(LinearMixer):
    """A linear attention of image models: its authors rotate features by position and convolve values besides (LePE).

    On an image these positions and this convolution have two dimensions; here one, and no token sees those after it.
    """

    class Config(LinearMixer.Config):
        # Tokens under the convolution of values that is added to what heads read (5 by 5 in the paper); 0: none.
        lepe: Annotated[int, Field(ge=0, le=16)] = 0
        # True: features are rotated by position in the sum of values, not in the sum of weights, as in the paper.
        rope: bool = False
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0

    # Parts of a head's features that are rotated each by itself.
    rotated_parts: ClassVar[int] = 1

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if config.rope and self.key % 2:
            raise self.config_error("rope", config.rope, f"needs an even head width, not {self.key}")
        self.local = ShortConvolution(self.inner, config.lepe, bias=True, activation="none") if config.lepe else None

    def weigh(
        self, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext, scale: float | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """`sums` of features `[B,T,H,...]`, and the state that both of them go on from."""
        if not self.config.rope:
            weighted, weight, memory = sums(q, k, v, past.get("memory"), sequence, scale=scale)
            return weighted, weight, {"memory": memory}
        place, position = positions(q, past.get("position"), sequence)
        ones = torch.ones_like(upcast(v[..., :1]))
        weight, sizes = sequence.run(linear_attention, q, k, ones, scale=scale, initial_state=past.get("sizes"))
        q, k = self._rotated(q, place), self._rotated(k, place)
        weighted, memory = sequence.run(
            linear_attention, q, k, upcast(v), scale=scale, initial_state=past.get("memory")
        )
        return weighted, weight, {"memory": memory, "sizes": sizes, "position": position}

    def _rotated(self, x: Tensor, place: Tensor) -> Tensor:
        parts = x.unflatten(3, (self.rotated_parts, -1)).flatten(2, 3)
        return rotate(parts, place, self.config.rope_base).unflatten(2, (-1, self.rotated_parts)).flatten(3)

    def with_local(
        self, out: Tensor, v: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What heads read, `[B,T,H,V]`, plus the values' convolution where there is one, and that one's state."""
        if self.local is None:
            return out, {}
        near, state = self.local(v.flatten(2), past.get("local"), sequence)
        return out + near.view_as(out), {"local": state}
