"""Activation checkpointing under which nothing is communicated twice."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from seqtrain.parallel import block_attention, exchange, scan

COMMUNICATE = (
    *scan.COMMUNICATE,
    *exchange.COMMUNICATE,
    *block_attention.COMMUNICATE,
)


def save_scans(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy for selective activation checkpointing: everything is computed again, but nothing is sent again."""
    return CheckpointPolicy.MUST_SAVE if operator in COMMUNICATE else CheckpointPolicy.PREFER_RECOMPUTE


# Pass as `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)`.
checkpoint_contexts: Callable = partial(create_selective_checkpoint_contexts, save_scans)
