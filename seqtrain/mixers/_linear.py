"""What linear attentions share that correct plain ones; each adds its feature map, normaliser or gates."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadProjections, upcast
from seqtrain.mixers._base import LayerShape, Mixer
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


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


@dataclass(frozen=True)
class LinearConfig:
    """The fields every mixer of this family has."""

    # Key channels over model.width, all heads together.
    expand_key: Annotated[float, Field(gt=0)] = 1.0
    # Value channels over model.width, all heads together.
    expand_value: Annotated[float, Field(gt=0)] = 1.0
    # Tokens under the short convolution of q, k and v; 0: none.
    conv_width: Annotated[int, Field(ge=0, le=16)] = 4


class LinearMixer(Mixer):
    """Linear attention on convolved q, k and v."""

    Config: ClassVar[type] = LinearConfig
    # True: the state also sums the keys, in a column of ones beside the values.
    sums_keys: ClassVar[bool] = True
    config: LinearConfig

    def __init__(self, config: LinearConfig, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        self.inner = shape.heads * self.value
        self.features = self.feature_count(self.key)
        widths = (self.key, self.key, self.value)
        self.qkv = HeadProjections(shape.width, shape.heads, widths, conv_width=config.conv_width)
        self.out = nn.Linear(self.inner, shape.width, bias=False)

    @staticmethod
    def feature_count(key: int) -> int:
        """Features of a query or key of `key` channels."""
        return key

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        memory = (batch, self.shape.heads, self.features, self.value + self.sums_keys)
        return {"memory": memory, **self.qkv.state_shapes(batch)}

    def weights(self) -> tuple[int, int]:
        matrices, others = self.qkv.weights()
        return matrices + self.inner * self.shape.width, others

    def operator_flops(self, tokens: int) -> int:
        memory = linear_attention_flops(tokens, self.shape.heads, self.features, self.value + self.sums_keys)
        return memory + self.qkv.flops(tokens)
