"""What the mixers of the delta rule share; each adds its own decay and output gate."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.kernels import delta_rule
from seqtrain.layers import HeadNorm, HeadProjections, l2norm, upcast
from seqtrain.mixers._base import EMPTY, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers._costs import delta_rule_flops
from seqtrain.parallel.sequence import SequenceContext

# q `[B,T,H,K]`, k of any length `[B,T,H,n*K]`, v `[B,T,H,n*V]`, beta `[B,T,H*n]` for n steps a token, and log_decay.
DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class DeltaConfig:
    """The fields every mixer of this family has."""

    # Key channels over model.width, all heads together.
    expand_key: Annotated[float, Field(gt=0)] = 1.0
    # Value channels over model.width, all heads together.
    expand_value: Annotated[float, Field(gt=0)] = 1.0
    # Tokens under the short convolution of q, k and v; 0: none.
    conv_width: Annotated[int, Field(ge=0, le=16)] = 4
    # True: beta in [0, 2], so that a state can change its sign (arXiv 2411.12537); False: in [0, 1].
    allow_negative_eigenvalues: bool = False


class DeltaMixer(Mixer):
    """`S_t = (I - beta k^T k) diag(a) S_{t-1} + beta k^T v` on convolved q, k, v, with q and k of unit length."""

    Config: ClassVar[type] = DeltaConfig
    config: DeltaConfig

    def __init__(self, config: DeltaConfig, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        self.inner = shape.heads * self.value
        self.steps = self.steps_per_token()
        widths = (self.key, self.steps * self.key, self.steps * self.value)
        self.qkv = HeadProjections(shape.width, shape.heads, widths, conv_width=config.conv_width)
        self.beta = nn.Linear(shape.width, shape.heads * self.steps, bias=False)
        self.norm = HeadNorm(self.value, self.gate_activation())
        self.out = nn.Linear(self.inner, shape.width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        past = state or EMPTY
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        beta = torch.sigmoid(upcast(self.beta(x)))  # B T H*steps
        if self.config.allow_negative_eigenvalues:
            beta = 2 * beta
        out, after["memory"] = self.remember((l2norm(q), k, v, beta, self.log_decay(x)), past.get("memory"), sequence)
        return self.out(self.norm(out, self.output_gate(x))), after

    def steps_per_token(self) -> int:
        """How many keys and values a token writes, one after the other."""
        return 1

    def remember(self, inputs: DeltaInputs, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        """The operator's output `[B,T,H,V]` and state."""
        q, k, *others = inputs
        return sequence.run(delta_rule, q, l2norm(k), *others, initial_state=past)

    @staticmethod
    def gate_activation() -> Literal["silu", "sigmoid"]:
        """What the output gate passes through: "silu" or "sigmoid"."""
        return "silu"

    def log_decay(self, x: Tensor) -> Tensor | None:
        """`log a`: None, `[B,T,H]` or `[B,T,H,K]`, from the layer's input `[B,T,D]`."""
        return None

    def output_gate(self, x: Tensor) -> Tensor | None:
        """What multiplies the normalised output: None or `[B,T,H*V]`, before its activation."""
        return None

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        return {"memory": (batch, self.shape.heads, self.key, self.value), **self.qkv.state_shapes(batch)}

    def weights(self) -> tuple[int, int]:
        matrices, others = self.qkv.weights()
        return matrices + (self.shape.heads * self.steps + self.inner) * self.shape.width, others + self.value

    def operator_flops(self, tokens: int) -> int:
        return delta_rule_flops(tokens * self.steps, self.shape.heads, self.key, self.value) + self.qkv.flops(tokens)
