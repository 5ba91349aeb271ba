"""flash-linear-attention's chunk kernels for the delta rule without decay, with one per token or per channel
(pip install fla-core). Where flash-qla is installed, too, that library calls it by itself."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import outside
from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.operator import Inputs

# By the dimensions of the log decays.
_FUNCTIONS = {
    0: ("fla.ops.delta_rule", "chunk_delta_rule"),
    3: ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    4: ("fla.ops.kda", "chunk_kda"),
}


def trials(device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of `run`, of small cases of all three forms."""
    return outside.delta_rule_trials(device, tuple(_FUNCTIONS))


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    return outside.missing("fla", "fla-core")


def serves(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, *_: Any) -> bool:
    """Whether these are 16 bits, and keys not wider than 256."""
    return inputs[0].shape[3] <= 256 and outside.serves_delta_rule(inputs, cu_seqlens)


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's `delta_rule`."""
    q, k, v, beta, log_decay, *_ = inputs
    options: dict[str, Any] = {"scale": scale, "initial_state": state, "output_final_state": True}
    options["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    if log_decay is None:
        out, final = outside.function(*_FUNCTIONS[0])(q, k, v, beta=beta.to(q.dtype), **options)
    else:
        out, final = outside.function(*_FUNCTIONS[log_decay.dim()])(q, k, v, g=log_decay, beta=beta, **options)
    return out, final
