"""SwiGLU by the native CPU kernels, forward and backward in one pass each: nothing but `up` is kept."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, check, count_parts, fields
from seqtrain.kernels.swiglu import chunked

__all__ = ["run", "unavailable"]


class _Call(ctypes.Structure):
    """`SwigluCall` of rows.cpp."""

    _fields_ = fields("up out d_out d_up", "boundaries", "documents parts width threads", "")


def run(up: Tensor) -> Tensor:
    """See `swiglu`."""
    if up.dtype not in KINDS:
        return chunked.run(up)
    return _operator(up)[0]


def _shapes(up: Tensor) -> tuple[Tensor]:
    return (up.new_empty(*up.shape[:-2], up.shape[-1]),)


def _forward(up: Tensor) -> tuple[Tensor]:
    (out,) = _shapes(up)
    call, _kept = _describe(up)
    call.out = Array.of(out)
    check(library().seqtrain_swiglu_forward(ctypes.byref(call)))
    return (out,)


def _backward(
    arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    [up] = arguments
    d_out, d_up = gradients[0].contiguous(), up.new_empty(up.shape)
    call, _kept = _describe(up)
    call.d_out, call.d_up = Array.of(d_out), Array.of(d_up)
    check(library().seqtrain_swiglu_backward(ctypes.byref(call)))
    return (d_up,)


def _describe(up: Tensor) -> tuple[_Call, Any]:
    """The call, and what must outlive it."""
    rows = up.contiguous().flatten(0, -3) if up.dim() > 2 else up.contiguous()[None]
    boundaries = (ctypes.c_int64 * 2)(0, len(rows))
    call = _Call(documents=1, parts=count_parts(len(rows)), width=rows.shape[2], threads=torch.get_num_threads())
    call.up, call.boundaries = Array.of(rows, rows.stride(0)), ctypes.addressof(boundaries)
    return call, (rows, boundaries)


_operator = differentiable("swiglu_native", _forward, _backward, _shapes, results=1)
