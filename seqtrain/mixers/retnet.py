"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621, eq. 5 to 8)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadNorm, HeadProjections, positions, rotate
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


class RetNet(Mixer):
    """Linear attention whose head h forgets by the fixed factor `1 - 2 ** (-5 - h)`, on rotated queries and keys.

    The rotation and the decay together are xPos; each head is normalised, then gated by swish.
    """

    state_dtypes: ClassVar = {"position": torch.int64}

    @dataclass(frozen=True)
    class Config:
        # Value channels over model.width, all heads together; key channels are as many as model.width.
        expand_value: Annotated[float, Field(gt=0)] = 2.0
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        # The slowest head's number in the decay: head h of H forgets by 2 ** -(first + h) a token.
        first_decay: Annotated[float, Field(gt=0)] = 5.0

    config: Config

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width()
        if self.key % 2:
            raise self.config_error("rope_base", config.rope_base, f"needs an even head width, not {self.key}")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        inner = shape.heads * self.value
        self.qkv = HeadProjections(shape.width, shape.heads, (self.key, self.key, self.value))
        self.gate = nn.Linear(shape.width, inner, bias=False)
        self.norm = HeadNorm(self.value)
        self.out = nn.Linear(inner, shape.width, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The paper's code draws its matrices from Xavier's rule, with gain 2 ** -2.5 within and 2 ** -1 at the end."""
        with torch.no_grad():
            # Fused here, one matrix each there: the bound is that of the parts.
            for weight in (*self.qkv.linear.weight.split(self.qkv.channels), self.gate.weight):
                nn.init.xavier_uniform_(weight, 2**-2.5, generator=generator)
            nn.init.xavier_uniform_(self.out.weight, 2**-1, generator=generator)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        (q, k, v), after = self.qkv(x, None, sequence)
        place, after["position"] = positions(x, past.get("position"), sequence)
        q, k = rotate(q, place, self.config.rope_base), rotate(k, place, self.config.rope_base)
        out, after["memory"] = sequence.run(
            linear_attention, q, k, v, self._log_decay(x.device), initial_state=past.get("memory")
        )
        return self.out(self.norm(out, self.gate(x))), after

    def _log_decay(self, device: torch.device) -> Tensor:
        power = self.config.first_decay + torch.arange(self.shape.heads, dtype=torch.float32, device=device)
        return torch.log1p(-torch.exp2(-power))

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.heads, self.key, self.value), "position": (batch,)}

    def weights(self) -> tuple[int, int]:
        inner = self.shape.heads * self.value
        return self.qkv.weights()[0] + 2 * inner * self.shape.width, self.value

    def operator_flops(self, tokens: int) -> int:
        return linear_attention_flops(tokens, self.shape.heads, self.key, self.value)
