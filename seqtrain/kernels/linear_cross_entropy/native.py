"""The softmax of each chunk by one native pass, which puts the logits' gradient in their place."""

import ctypes

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from seqtrain.kernels.linear_cross_entropy import IGNORED, chunked
from seqtrain.kernels.linear_cross_entropy.chunked import chunk_by_chunk
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, check, count_parts, fields

__all__ = ["run", "unavailable"]


class _Call(ctypes.Structure):
    """`SoftmaxCall` of rows.cpp."""

    _fields_ = fields("logits", "labels boundaries losses", "documents parts width ignored gradient threads", "")


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float, losses: Tensor | None = None) -> Tensor:
    """See `linear_cross_entropy`."""
    return chunk_by_chunk(hidden, weight, labels, chunk, cap, losses, softmax)


def softmax(logits: Tensor, labels: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See `chunked.Softmax`."""
    if logits.dtype not in KINDS or not logits.is_contiguous() or torch.compiler.is_compiling() or is_fake(logits):
        return chunked.softmax(logits, labels, need_gradient)
    labels, losses = labels.contiguous(), logits.new_empty(len(logits), dtype=torch.float32)
    boundaries = (ctypes.c_int64 * 2)(0, len(logits))
    call = _Call(documents=1, width=logits.shape[1], ignored=IGNORED, gradient=need_gradient)
    call.parts, call.threads = count_parts(16 * len(logits)), torch.get_num_threads()
    call.logits, call.labels, call.losses = Array.of(logits), labels.data_ptr(), losses.data_ptr()
    call.boundaries = ctypes.addressof(boundaries)
    check(library().seqtrain_softmax(ctypes.byref(call)))
    return losses, logits if need_gradient else None
