"""What backends share: documents' boundaries on the host, a definition run token by token, and the dtype of states."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def state_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of these dtypes: float32 at least, float64 or complex where one is."""
    return reduce(torch.promote_types, dtypes, torch.float32)


class Boundaries(tuple[int, ...]):
    """Where documents begin and a row's end, on the host; hashed and checked once, however many ask.

    `rise`: whether none lies before the one to its left.
    """

    rise: bool
    _hash: int

    def __new__(cls, numbers: Iterable[int]) -> "Boundaries":
        found = super().__new__(cls, numbers)
        found.rise = all(a <= b for a, b in pairwise(found))
        found._hash = tuple.__hash__(found)
        return found

    def __hash__(self) -> int:
        return self._hash


def boundaries_of(cu_seqlens: Tensor) -> Boundaries:
    """`cu_seqlens`, int `[N+1]`, on the host: read once a tensor, since all layers of a step are given the same one."""
    if cu_seqlens.is_inference():
        return Boundaries(cu_seqlens.tolist())
    known = cu_seqlens.__dict__.get("boundaries")
    if known is None or known[0] != cu_seqlens._version:
        known = cu_seqlens.__dict__["boundaries"] = (cu_seqlens._version, Boundaries(cu_seqlens.tolist()))
    found: Boundaries = known[1]
    return found


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
    boundaries = boundaries_of(cu_seqlens)
    pieces = [
        run(*(None if tensor is None else tensor[:, start:end] for tensor in tensors), state[n : n + 1])
        for n, (start, end) in enumerate(pairwise(boundaries))
    ]
    return torch.cat([out for out, _ in pieces], 1), torch.cat([final for _, final in pieces])


def by_token(
    step: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Any],
    state: Tensor,
    cu_seqlens: Tensor | None,
    *,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """A definition: `step(*tensors at a token, state) -> (output at it, state)`, one token after the other.

    `tensors`: `[B,T,...]` or None each. `like`: of the output's shape. `out` comes back in the state's dtype.
    """

    def loop(like: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, state = inputs
        rows = []
        for t in range(like.shape[1]):
            row, state = step(*(None if x is None else x[:, t] for x in tensors), state)
            rows.append(row)
        return (torch.stack(rows, 1) if rows else like.to(state.dtype)), state

    return by_document(loop, (like, *tensors), state, cu_seqlens)
