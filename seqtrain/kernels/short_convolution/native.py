"""The short convolution with its activation by the native CPU kernels, forward and backward in one pass each."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, by_token, check, count_parts, fields, find_boundaries
from seqtrain.kernels.operator import Inputs

__all__ = ["run", "serves", "unavailable"]


class _Call(ctypes.Structure):
    """`ConvolutionCall` of convolution.cpp."""

    _fields_ = fields(
        "x out d_out d_x",
        "weight bias state final_state d_final d_state d_weight d_bias boundaries",
        "documents parts width taps dilation silu threads",
        "",
    )


def serves(inputs: Inputs, state: Tensor, *_: Any) -> bool:
    """Whether the library takes a call: not in float64."""
    return state.dtype == torch.float32


def run(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, activation: str, dilation: int
) -> tuple[Tensor, Tensor]:
    """See `short_convolution`."""
    x, weight, bias = inputs
    given = x if x.dtype in KINDS else x.float()
    bias = None if bias is None else bias.float()
    out, final = _operator(given, weight.float(), bias, state, cu_seqlens, activation == "silu", dilation)
    return out.to(x.dtype), final


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool, dilation: int
) -> tuple[Tensor, Tensor]:
    out, final = _shapes(x, weight, bias, state)
    call, _kept = _describe(x, weight, bias, state, cu_seqlens, silu, dilation)
    call.out, call.final_state = Array.of(out), final.data_ptr()
    check(library().seqtrain_convolution_forward(ctypes.byref(call)))
    return out, final


def _backward(
    arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, *_options = arguments
    d_out, d_final = (each.contiguous() for each in gradients)
    call, _kept = _describe(*arguments)
    d_x, d_state = x.new_empty(x.shape), state.new_empty(state.shape)
    parts = call.documents, call.parts
    d_weight = weight.new_empty(*parts, weight.shape[1], weight.shape[0])
    d_bias = weight.new_empty(*parts, weight.shape[0])
    call.d_out, call.d_x = Array.of(d_out), Array.of(d_x)
    call.d_final, call.d_state = d_final.data_ptr(), d_state.data_ptr()
    call.d_weight, call.d_bias = d_weight.data_ptr(), d_bias.data_ptr()
    check(library().seqtrain_convolution_backward(ctypes.byref(call)))
    return d_x, d_weight.sum((0, 1)).T, None if bias is None else d_bias.sum((0, 1)), d_state, None, None, None


def _describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool, dilation: int
) -> tuple[_Call, Any]:
    """The call, and what must outlive it."""
    [x] = by_token(x if x.stride(2) == 1 else x.contiguous())
    taps, bias = weight.T.contiguous(), None if bias is None else bias.contiguous()
    state, boundaries = state.contiguous(), find_boundaries(x, cu_seqlens)
    call = _Call(silu=silu, dilation=dilation, threads=torch.get_num_threads())
    call.taps, call.width = taps.shape
    call.x = Array.of(x, x.stride(1))
    call.weight, call.bias = taps.data_ptr(), None if bias is None else bias.data_ptr()
    call.state, call.boundaries = state.data_ptr(), boundaries.data_ptr()
    call.documents = len(boundaries) - 1
    call.parts = count_parts(x.shape[0] * x.shape[1], call.documents)
    return call, (x, taps, bias, state, boundaries)


_operator = differentiable("short_convolution_native", _forward, _backward, _shapes, results=2)
