"""Argument checks shared by the operators: every complaint names the argument, what came and what was expected."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from seqtrain.kernels.documents import boundaries_of

# Dtypes an argument may have.
KINDS: dict[str, Callable[[Tensor], bool]] = {
    "a floating dtype": lambda x: x.is_floating_point(),
    "a floating or complex dtype": lambda x: x.is_floating_point() or x.is_complex(),
    "a complex dtype": lambda x: x.is_complex(),
    "int64": lambda x: x.dtype == torch.int64,
    "any dtype": lambda x: True,
}


def check_shape(name: str, tensor: Tensor, shapes: Mapping[int, Sequence[str]], sizes: dict[str, int]) -> None:
    """Checks a tensor against shapes written in letters, given by their number of dimensions; adds to `sizes`.

    A letter takes its size where it first occurs and must agree everywhere else; `K+1` is one more than K. Raises
    `ValueError`.
    """
    came = tensor.shape
    letters = shapes.get(len(came))
    if letters is None:
        expected = " or ".join(f"[{', '.join(each)}]" for each in shapes.values())
        raise ValueError(f"{name} has shape {tuple(came)}, expected {expected}")
    for letter, size in zip(letters, came, strict=True):
        wanted = sizes[letter[:-2]] + 1 if letter.endswith("+1") else sizes.setdefault(letter, size)
        if wanted != size:
            expected = f"[{', '.join(letters)}] with {letter}={wanted}"
            raise ValueError(f"{name} has shape {tuple(came)}, expected {expected}")


def check_kind(name: str, tensor: Tensor, kind: str) -> None:
    """Raises `ValueError` for a dtype that is not one of `kind`, of `KINDS`."""
    if not KINDS[kind](tensor):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {kind}")


def check_documents(operator: str, cu_seqlens: Tensor | None, batch: int, tokens: int) -> int:
    """Checks document boundaries; returns how many states the call carries: `N`, or `batch` without boundaries.

    `cu_seqlens`: int `[N+1]`, from 0 to `tokens`, never falling; needs `batch == 1`. Empty documents are allowed.
    Raises `ValueError`.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"{operator}: cu_seqlens needs B=1, but B={batch}; flatten the batch into one row")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        came = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{operator}: cu_seqlens is {came}, expected int32 or int64 [N+1] with N >= 1")
    if torch.compiler.is_compiling():  # what a graph may not read, its operators do
        return cu_seqlens.shape[0] - 1
    boundaries = boundaries_of(cu_seqlens)
    if boundaries[0] != 0 or boundaries[-1] != tokens or not boundaries.rise:
        raise ValueError(
            f"{operator}: cu_seqlens must rise from 0 to T={tokens}, came {list(boundaries[:8])}... to {boundaries[-1]}"
        )
    return len(boundaries) - 1


def check_state(operator: str, state: Tensor | None, expected: tuple[int, ...], device: torch.device) -> None:
    """Raises `ValueError` unless `initial_state` is absent or has the expected shape and device."""
    if state is None:
        return
    if tuple(state.shape) != expected:
        raise ValueError(f"{operator}: initial_state has shape {tuple(state.shape)}, expected {expected}")
    if state.device != device:
        raise ValueError(f"{operator}: initial_state is on {state.device}, expected {device}")
