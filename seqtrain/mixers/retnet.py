"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621, eq. 5 to 8)."""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from seqtrain.initialization import Initializer, initialize
from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadNorm, HeadProjections, Linear, positions, rotate
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.recurrence import LinearRecurrence


def retention(heads: int, first: float, device: torch.device) -> Tensor:
    """The logarithm of head h's decay `1 - 2 ** -(first + h)`: float32 `[H]`."""
    power = first + torch.arange(heads, dtype=torch.float32, device=device)
    return torch.log1p(-torch.exp2(-power))


class RetNetRecurrence(LinearRecurrence):
    """Key head h forgets by the fixed factor `1 - 2 ** (-5 - h)`, as the mixer does by default."""

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        heads, tensor = self.heads, self.heads.tensor
        decay = tensor.own(retention(heads.groups * tensor.count, RetNet.Config.first_decay, x.device))
        return super().write(x, k, v) | {"log_decay": decay.expand(*x.shape[:2], -1)}


class RetNet(Mixer):
    """Linear attention whose head h forgets by the fixed factor `1 - 2 ** (-5 - h)`, on rotated queries and keys.

    The rotation and the decay together are xPos; each head is normalised, then gated by swish.
    """

    recurrence = RetNetRecurrence

    class Config(MixerConfig):
        # Value channels over model.width, all heads together; key channels are as many as model.width.
        expand_value: PositiveFloat = 2.0
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        # The slowest head's number in the decay: head h of H forgets by 2 ** -(first + h) per token.
        first_decay: PositiveFloat = 5.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.even_part_of_width()
        self.value = self.part_of_width(config.expand_value, "expand_value")
        inner = shape.heads * self.value
        self.qkv = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value))
        self.gate = Linear(shape.width, inner, bias=False)
        self.norm = HeadNorm(self.value)
        self.out = self.output(inner)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """The paper's code draws its matrices from Xavier's rule, with gain 2 ** -2.5 within and 2 ** -1 at the end."""

        def xavier(gain: float, *rows: int) -> Initializer:
            # Fused here, one matrix each there: the bound is that of the parts.
            return lambda weight, generator: [
                nn.init.xavier_uniform_(part, gain, generator=generator) for part in weight.split(rows or len(weight))
            ]

        within = {self.qkv.linear.weight: xavier(2**-2.5, *self.qkv.channels), self.gate.weight: xavier(2**-2.5)}
        return within | {self.out.weight: xavier(2**-1)}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, None, sequence)
        place, after["position"] = positions(x, past.get("position"), sequence)
        q, k = rotate(q, place, self.config.rope_base), rotate(k, place, self.config.rope_base)
        log_decay = self.shape.tensor.own(retention(self.shape.all_heads, self.config.first_decay, x.device))
        out, after["memory"] = sequence.run(linear_attention, q, k, v, log_decay, initial_state=past.get("memory"))
        return self.out(self.norm(out, self.gate(x))), after
