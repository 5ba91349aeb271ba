"""Argument checks shared by the operators: every complaint names the argument, what came and what was expected."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def check_shapes(operator: str, tensors: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """Checks tensors against shapes written in letters and returns the letters' sizes.

    `tensors` maps an argument's name to `(tensor, shape)`, the shape as letters separated by spaces (`"B T H K"`). A
    letter takes its size where it first occurs and must agree everywhere else. All tensors must lie on one device.
    Raises `ValueError`.
    """
    sizes: dict[str, int] = {}
    first = next(iter(tensors))
    device = tensors[first][0].device
    for name, (tensor, shape) in tensors.items():
        letters = shape.split()
        came = tuple(tensor.shape)
        if len(came) != len(letters):
            raise ValueError(f"{operator}: {name} has shape {came}, expected [{', '.join(letters)}]")
        for letter, size in zip(letters, came, strict=True):
            if sizes.setdefault(letter, size) != size:
                expected = f"[{', '.join(letters)}] with {letter}={sizes[letter]}"
                raise ValueError(f"{operator}: {name} has shape {came}, expected {expected}")
        if tensor.device != device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, expected {device}, where {first} is")
    return sizes


def check_floating(operator: str, tensors: Mapping[str, Tensor], *, allow_complex: bool = False) -> None:
    """Raises `ValueError` for a tensor that is not floating point (or complex, where allowed)."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or (allow_complex and tensor.is_complex())):
            kind = "a floating or complex" if allow_complex else "a floating"
            raise ValueError(f"{operator}: {name} has dtype {tensor.dtype}, expected {kind} dtype")


def check_documents(operator: str, cu_seqlens: Tensor | None, batch: int, tokens: int) -> int:
    """Checks document boundaries and returns how many states the call carries: `N` documents, or `batch` without
    boundaries.

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
    boundaries = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != tokens or any(a > b for a, b in pairwise(boundaries)):
        raise ValueError(
            f"{operator}: cu_seqlens must rise from 0 to T={tokens}, came {boundaries[:8]}... to {boundaries[-1]}"
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
