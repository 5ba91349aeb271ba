"""Attention Gym's chunk kernels for Gated DeltaNet (pip install 'attn-gym[linear]'), whose states are `[N,H,V,K]`."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import outside
from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.operator import Inputs

trials = outside.delta_rule_trials


def unavailable() -> str | None:
    """Why this backend can't run here, or None."""
    return outside.missing("attn_gym", "attn-gym[linear]", capabilities=(8, 9, 10, 12))


def serves(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, *_: Any) -> bool:
    """Whether these are 16 bits, keys and values both 64 or 128 wide, with a decay per token."""
    log_decay, key, value = inputs[4], inputs[0].shape[3], inputs[2].shape[3]
    if log_decay is None or log_decay.dim() != 3 or key != value or key not in (64, 128):
        return False
    return outside.serves_delta_rule(inputs, cu_seqlens)


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention Gym's `delta_rule`."""
    q, k, v, beta, log_decay, *_ = inputs
    chunk = outside.function("attn_gym.linear.gdn", "chunk_gdn")
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    options = {"cu_seqlens": cu_seqlens, "scale": scale, "output_final_state": True}
    out, final = chunk(q, k, v, log_decay, beta, state.mT.contiguous(), **options)
    return out, final.mT.contiguous()
