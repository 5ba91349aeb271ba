"""What the reference backends share: running a definition document by document, and the dtype states are carried in."""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor


def state_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of these dtypes: float32 at least, float64 or complex where one is."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def by_document(
    run: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor | None, ...],
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run(*tensors, state) -> (out, final_state)` on each document of a packed row by itself, then joined again.

    `tensors`: `[1,T,...]` or None each. `state`: `[N,...]`, one row per document. Without boundaries it is one call on
    `[B,T,...]`.
    """
    if cu_seqlens is None:
        return run(*tensors, state)
    boundaries = cu_seqlens.tolist()
    pieces = [
        run(*(None if tensor is None else tensor[:, start:end] for tensor in tensors), state[n : n + 1])
        for n, (start, end) in enumerate(pairwise(boundaries))
    ]
    return torch.cat([out for out, _ in pieces], 1), torch.cat([final for _, final in pieces])
