"""What the mixers of the delta rule share; each adds its own decay and output gate."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from seqtrain.kernels import delta_rule
from seqtrain.layers import HeadNorm, Linear, l2norm, upcast
from seqtrain.mixers.common.base import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import ProjectedMixer
from seqtrain.mixers.common.recurrence import Heads, Reading, Recurrence, RecurrenceOptions, run_grouped
from seqtrain.mixers.common.take_over import Projections, copy_projections, fused_projections, gate_rows, pass_on

# q `[B,T,H,K]`, k of any length `[B,T,H,n*K]`, v `[B,T,H,n*V]`, beta `[B,T,H*n]` for n steps per token, and log_decay.
DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class DeltaRecurrence(Recurrence):
    """`S_t = (I - beta k^T k) S_{t-1} + beta k^T v`, q and k of unit length (DeltaNet, arXiv 2406.06484)."""

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.beta = Linear(heads.width, heads.groups, bias=False)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": l2norm(k), "v": v, "beta": torch.sigmoid(upcast(self.beta(x)))}

    def read(self, q: Tensor, written: Past, past: Past, sequence: SequenceContext) -> Reading:
        k, v, beta, decay = written["k"], written["v"], written["beta"], written.get("log_decay")
        out, memory = run_grouped(
            sequence, delta_rule, l2norm(q), k, v, beta, decay, scale=1.0, past=past.get("memory")
        )
        return out, None, {"memory": memory}


class DeltaMixer(ProjectedMixer):
    """`S_t = (I - beta k^T k) diag(a) S_{t-1} + beta k^T v` on convolved q, k, v, with q and k of unit length."""

    class Config(ProjectedMixer.Config):
        # True: beta in [0, 2], so that a state can change its sign (arXiv 2411.12537); False: in [0, 1].
        allow_negative_eigenvalues: bool = False
        # Heads of values; 0: model.heads.
        heads: NonNegativeInt = 0
        # Heads of queries and keys, which as many value heads each share; 0: as many as value heads.
        key_heads: NonNegativeInt = 0
        # Channels of a key head and of a value head; 0: as expand_key and expand_value say.
        key_width: NonNegativeInt = 0
        value_width: NonNegativeInt = 0
        # Added to the mean square in the norm of what heads read.
        norm_eps: PositiveFloat = 1e-6
        # What q, k and v pass through where conv_width=0; a convolution always applies SiLU.
        activation: Literal["silu", "none"] = "silu"

    # What the output gate passes through.
    gate_activation: ClassVar[Literal["silu", "sigmoid"]] = "silu"

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.beta = Linear(shape.width, shape.heads * self.steps, bias=False)
        self.norm = HeadNorm(self.value, self.gate_activation, config.norm_eps)
        self.out = self.output(self.inner)
        # What multiplies the normalised output, `[B,T,D]` -> `[B,T,H*V]` before its activation; None: nothing.
        self.gate: nn.Module | None = None

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        beta = torch.sigmoid(upcast(self.beta(x)))  # B T H*steps
        if self.config.allow_negative_eigenvalues:
            beta = 2 * beta
        inputs = self.shared(l2norm(q)), k, v, beta, self.log_decay(x)
        out, after["memory"] = self.recur(inputs, past.get("memory"), sequence)
        return self.out(self.norm(out, self.gate(x) if self.gate is not None else None)), after

    def projections(self) -> Projections:
        if self.steps > 1:
            return {}
        return fused_projections("qkv.linear.weight", self.qkv.channels)

    @torch.no_grad()
    def init_from_attention(self, attention: Any) -> None:
        """Its q, k and v are the attention's, and the gate begins as `gate_rows` says."""
        if {self.key, self.value} != {attention.key} or not self.projections():
            raise self.config_error("key_width", self.key, "must be a head of the attention it replaces")
        copy_projections(self, attention)
        if isinstance(self.gate, nn.Linear):
            self.gate.weight.copy_(gate_rows(attention, self.shape.heads))
        if self.qkv.conv is not None:
            pass_on(self.qkv.conv, attention, {})

    def activated(self) -> bool:
        return self.config.activation == "silu"

    @property
    def steps(self) -> int:
        """How many keys and values a token writes, one after the other."""
        return 1

    def head_widths(self) -> tuple[int, int, int]:
        return self.key, self.steps * self.key, self.steps * self.value

    def recur(self, inputs: DeltaInputs, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        """The operator's output `[B,T,H,V]` and state."""
        q, k, *others = inputs
        return sequence.run(delta_rule, q, self.shared(l2norm(k)), *others, initial_state=past)

    @property
    def key_heads(self) -> int:
        return self.shape.share(self.all_key_heads, f"{self.all_key_heads} key heads")

    @property
    def all_key_heads(self) -> int:
        """Those of all ranks."""
        return self.config.key_heads or self.shape.all_heads

    def sizes(self) -> tuple[int, int]:
        config = self.config
        if self.shape.all_heads % self.all_key_heads:
            raise self.config_error("key_heads", config.key_heads, f"must divide {self.shape.all_heads} value heads")
        key = config.key_width or self.part_of_width(config.expand_key, "expand_key")
        return key, config.value_width or self.part_of_width(config.expand_value, "expand_value")

    def shared(self, x: Tensor) -> Tensor:
        """Queries or keys `[B,T,key_heads,K]` as every value head reads them, `[B,T,H,K]`."""
        times = self.shape.heads // self.key_heads
        return x if times == 1 else x.repeat_interleave(times, 2)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """`log a`: None, `[B,T,H]` or `[B,T,H,K]`, from the layer's input `[B,T,D]`."""
        return None
