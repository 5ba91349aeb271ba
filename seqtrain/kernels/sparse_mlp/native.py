"""A few rows by the native CPU kernel, which reads the weights of kept channels alone."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, check, fields
from seqtrain.kernels.sparse_mlp import chunked

__all__ = ["run", "serves", "unavailable"]

# Most rows of a call: with more, a matrix product that reads all channels once is faster.
_ROWS = 8
# Hidden channels of a part: each part's sums are added up by itself, whatever the threads.
_CHANNELS = 512


class _Call(ctypes.Structure):
    """`SparseMLPCall` of sparse_mlp.cpp."""

    _fields_ = fields("value down", "gate x sums boundaries", "documents parts rows hidden inner width threads")


def serves(gate: Tensor, x: Tensor, *_: Any) -> bool:
    """Whether there are few rows with numbers, and nothing is to be differentiated."""
    if torch.compiler.is_compiling() or is_fake(x):
        return False
    return not torch.is_grad_enabled() and x.numel() <= _ROWS * x.shape[-1] and x.dtype in KINDS


def run(gate: Tensor, x: Tensor, value: Tensor, down: Tensor) -> Tensor:
    """See `sparse_mlp`."""
    if not all(weight.dtype in KINDS and weight.is_contiguous() for weight in (value, down)):
        return chunked.run(gate, x, value, down)
    hidden, inner = value.shape
    gates, rows = (each.reshape(-1, each.shape[-1]).float().contiguous() for each in (gate, x))
    boundaries = (ctypes.c_int64 * 2)(0, len(rows))
    call = _Call(documents=1, parts=-(-hidden // _CHANNELS), threads=torch.get_num_threads())
    call.rows, call.hidden, call.inner, call.width = len(rows), hidden, inner, down.shape[1]
    sums = rows.new_empty(call.parts, len(rows), down.shape[1])
    call.value, call.down = Array.of(value), Array.of(down)
    call.gate, call.x, call.sums = gates.data_ptr(), rows.data_ptr(), sums.data_ptr()
    call.boundaries = ctypes.addressof(boundaries)
    check(library().seqtrain_sparse_mlp(ctypes.byref(call)))
    return sums.sum(0).to(x.dtype).view(*x.shape[:-1], down.shape[1])
