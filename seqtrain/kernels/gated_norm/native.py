"""Norm and gate by the native CPU kernels, forward and backward, each in one pass over its rows."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.gated_norm import token_rows
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, check, count_parts, fields

__all__ = ["run", "serves", "unavailable"]


class _Call(ctypes.Structure):
    """`NormCall` of norm.cpp; `scale` is its eps."""

    _fields_ = fields(
        "x gate out d_out d_x d_gate",
        "weight sums boundaries",
        "documents parts heads width weights silu gate_first threads",
    )


def serves(x: Tensor, *_: Any) -> bool:
    """Whether the library takes x: not in float64."""
    return x.dtype in KINDS


def run(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """See `gated_norm`."""
    gate = gate if gate is None or gate.dtype in KINDS else gate.float()
    return _operator(x, weight.float(), gate, eps, silu, gate_first)[0]


def _shapes(x: Tensor, *_: Any) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> tuple[Tensor]:
    (out,) = _shapes(x)
    if x.numel():
        call, _kept = _describe(x, weight, gate, eps, silu, gate_first)
        call.out = Array.of(out)
        check(library().seqtrain_norm_forward(ctypes.byref(call)))
    return (out,)


def _backward(
    arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    x, weight, gate = arguments[:3]
    d_x, d_gate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
    if not x.numel():
        return d_x, torch.zeros_like(weight), d_gate, None, None, None
    call, _kept = _describe(*arguments)
    d_out, sums = gradients[0].contiguous(), weight.new_empty(call.parts, *weight.shape)
    call.d_out, call.d_x, call.d_gate = Array.of(d_out), Array.of(d_x), Array.of(d_gate)
    call.sums = sums.data_ptr()
    check(library().seqtrain_norm_backward(ctypes.byref(call)))
    return d_x, sums.sum(0), d_gate, None, None, None


def _describe(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool
) -> tuple[_Call, Any]:
    """The call, and what must outlive it."""
    x, gate, weight = token_rows(x), None if gate is None else token_rows(gate), weight.contiguous()
    tokens = x.shape[0]
    boundaries = (ctypes.c_int64 * 2)(0, tokens)
    call = _Call(scale=eps, documents=1, parts=count_parts(tokens), threads=torch.get_num_threads())
    call.x, call.gate = Array.of(x, x.stride(0)), Array.of(gate, 0 if gate is None else gate.stride(0))
    call.weight = weight.data_ptr()
    call.width, call.weights = weight.shape[-1], weight.shape[0] if weight.dim() > 1 else 1
    call.heads = x.shape[1] // call.width
    call.silu, call.gate_first = silu, gate_first
    call.boundaries = ctypes.addressof(boundaries)
    return call, (x, gate, weight, boundaries)


_operator = differentiable("gated_norm_native", _forward, _backward, _shapes, results=1)
