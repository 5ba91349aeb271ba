"""FlashQLA's fused kernels for Gated DeltaNet on Hopper and Blackwell (pip install flash-qla)."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import outside
from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.operator import Inputs

trials = outside.delta_rule_trials


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    return outside.missing("flash_qla", "flash-qla", capabilities=(9, 10))


def serves(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, *_: Any) -> bool:
    """Whether these are 16 bits, 128 wide, with a decay per token."""
    log_decay, widths = inputs[4], {inputs[0].shape[3], inputs[2].shape[3]}
    if log_decay is None or log_decay.dim() != 3 or widths != {128}:
        return False
    return outside.serves_delta_rule(inputs, cu_seqlens)


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """FlashQLA's `delta_rule`."""
    q, k, v, beta, log_decay, *_ = inputs
    options = {"scale": scale, "initial_state": state, "output_final_state": True}
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    chunk = outside.function("flash_qla", "chunk_gated_delta_rule")
    out, final = chunk(q, k, v, g=log_decay, beta=beta, cu_seqlens=cu_seqlens, **options)
    return out, final
