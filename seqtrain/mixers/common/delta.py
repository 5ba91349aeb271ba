"""What the mixers of the delta rule share; each adds its own decay and output gate."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from seqtrain.kernels import delta_rule
from seqtrain.layers import HeadNorm, l2norm, upcast
from seqtrain.mixers.common.base import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import ProjectedMixer
from seqtrain.mixers.common.recurrence import Heads, Reading, Recurrence, RecurrenceOptions, run_grouped

# q `[B,T,H,K]`, k of any length `[B,T,H,n*K]`, v `[B,T,H,n*V]`, beta `[B,T,H*n]` for n steps per token, and log_decay.
DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class DeltaRecurrence(Recurrence):
    """`S_t = (I - beta k^T k) S_{t-1} + beta k^T v`, q and k of unit length (DeltaNet, arXiv 2406.06484)."""

    def __init__(self, heads: Heads, options: RecurrenceOptions):
        super().__init__(heads, options)
        self.beta = nn.Linear(heads.width, heads.groups, bias=False)

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

    # What the output gate passes through.
    gate_activation: ClassVar[Literal["silu", "sigmoid"]] = "silu"

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.beta = nn.Linear(shape.width, shape.heads * self.steps, bias=False)
        self.norm = HeadNorm(self.value, self.gate_activation)
        self.out = nn.Linear(self.inner, shape.width, bias=False)
        # What multiplies the normalised output, `[B,T,D]` -> `[B,T,H*V]` before its activation; None: nothing.
        self.gate: nn.Module | None = None

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        beta = torch.sigmoid(upcast(self.beta(x)))  # B T H*steps
        if self.config.allow_negative_eigenvalues:
            beta = 2 * beta
        inputs = l2norm(q), k, v, beta, self.log_decay(x)
        out, after["memory"] = self.recur(inputs, past.get("memory"), sequence)
        return self.out(self.norm(out, self.gate(x) if self.gate is not None else None)), after

    @property
    def steps(self) -> int:
        """How many keys and values a token writes, one after the other."""
        return 1

    def head_widths(self) -> tuple[int, int, int]:
        return self.key, self.steps * self.key, self.steps * self.value

    def recur(self, inputs: DeltaInputs, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        """The operator's output `[B,T,H,V]` and state."""
        q, k, *others = inputs
        return sequence.run(delta_rule, q, l2norm(k), *others, initial_state=past)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """`log a`: None, `[B,T,H]` or `[B,T,H,K]`, from the layer's input `[B,T,D]`."""
        return None
