"""What calls of the native library share: how it is told of tensors and of documents."""

import ctypes
from typing import Any

import torch
from torch import Tensor

# What the library reads and writes; `Kind` of arrays.h.
KINDS = {torch.float32: 1, torch.bfloat16: 2}
# Least tokens of a part, and most parts.
_TOKENS, _PARTS = 64, 32


class Array(ctypes.Structure):
    """`Array` of arrays.h: where a tensor lies, and its dtype. The tensor must outlive the call."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "token", "head"))]

    @classmethod
    def of(cls, tensor: Tensor | None, token: int = 0, head: int = 0) -> "Array":
        """`token`, `head`: strides, of what is not contiguous throughout."""
        return cls(None, 0) if tensor is None else cls(tensor.data_ptr(), KINDS[tensor.dtype], token, head)

    @classmethod
    def strided(cls, tensor: Tensor | None) -> "Array":
        """Of `[B,T,H,...]` as `by_token` gives it."""
        return cls(None, 0) if tensor is None else cls.of(tensor, *tensor.stride()[1:3])


def fields(arrays: str, pointers: str, numbers: str, doubles: str = "scale") -> list[tuple[str, Any]]:
    """Those of a call, by name: arrays, addresses, whole numbers, others; mirrors a struct of the library's."""
    kinds = ((arrays, Array), (pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (doubles, ctypes.c_double))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def by_token(*tensors: Tensor | None) -> list[Any]:
    """`[B,T,H,...]`, in which all tokens are as far apart and a head's numbers lie side by side: views, or copies."""
    return [x if x is None or _regular(x) else x.contiguous() for x in tensors]


def _regular(x: Tensor) -> bool:
    # What there is none of, as the output of a call without queries, has no dimensions either.
    rows = x.dim() > 2 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return rows and (x.dim() == 3 or x.stride(3) == 1)


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


def count_parts(tokens: int, documents: int = 1) -> int:
    """In how many parts each of so many documents is taken whose parts' sums are kept apart: not one for each thread,
    so that these do not change a bit."""
    return max(1, min(_PARTS, tokens // (_TOKENS * max(1, documents))))
