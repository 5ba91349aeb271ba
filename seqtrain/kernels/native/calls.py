"""What calls of the native library share: how it is told of tensors and of documents."""

import ctypes
from typing import Any

import torch
from torch import Tensor

# What the library reads and writes; `Kind` of arrays.h.
KINDS = {torch.float32: 1, torch.bfloat16: 2}


class Array(ctypes.Structure):
    """`Array` of arrays.h: where a contiguous tensor lies, and its dtype. The tensor must outlive the call."""

    _fields_ = [("data", ctypes.c_void_p), ("kind", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Array":
        return cls(None, 0) if tensor is None else cls(tensor.data_ptr(), KINDS[tensor.dtype])


def fields(arrays: str, pointers: str, numbers: str) -> list[tuple[str, Any]]:
    """Those of a call, by name: arrays, addresses, numbers, and its scale; mirrors a struct of the library's."""
    kinds = ((arrays, Array), (pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), ("scale", ctypes.c_double))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def find_boundaries(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Boundaries of documents among the tokens of all rows of `q: [B,T,...]`, int64."""
    if cu_seqlens is None:
        return torch.arange(q.shape[0] + 1) * q.shape[1]
    return cu_seqlens.to(torch.int64).contiguous()


def check(status: int) -> None:
    """Raises `MemoryError` where the library says that there is none."""
    if status:
        raise MemoryError("native kernels: no memory for a thread's scratch")
