"""The diagonal scan by the native CPU kernels, forward and backward in one pass each; sums and states are float32."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.diagonal_scan.chunked import decay_of
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.kernels.native.calls import KINDS, Array, by_token, check, fields, find_boundaries
from seqtrain.kernels.operator import Inputs

__all__ = ["run", "serves", "unavailable"]

# Channels, in floats, that a thread takes at a time, and the fewest where threads are many.
_BLOCK, _LEAST = 256, 16


class _Call(ctypes.Structure):
    """`ScanCall` of scan.cpp."""

    _fields_ = fields(
        "x decay out d_out d_x d_log",
        "state shared final_state d_final d_state sums boundaries",
        "documents parts width is_complex logarithms threads",
        "",
    )


def serves(inputs: Inputs, state: Tensor, *_: Any) -> bool:
    """Whether the library takes a call: not in double precision."""
    return state.dtype in (torch.float32, torch.complex64)


def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`."""
    x, log_a = inputs
    if state.is_complex():
        out, final = _operator(x.to(state.dtype), log_a.to(state.dtype), state, cu_seqlens)
        return out, final
    given = (each if each.dtype in KINDS else each.float() for each in (x, log_a))
    out, final = _operator(*given, state, cu_seqlens)
    return out.to(x.dtype), final


def _shapes(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _forward(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    out, final = _shapes(x, log_a, state, cu_seqlens)
    call, _kept = _describe(x, log_a, state, cu_seqlens)
    call.out, call.final_state = _array(out), final.data_ptr()
    check(library().seqtrain_scan_forward(ctypes.byref(call)))
    return out, final


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    x, log_a, state, _ = arguments
    out, d_out, d_final = (each.contiguous().resolve_conj() for each in (kept[0], *gradients))
    call, _kept = _describe(*arguments)
    shared = log_a.dim() == 1
    d_x, d_state = x.new_empty(x.shape), state.new_empty(state.shape)
    d_log = state.new_empty(state.shape) if shared else log_a.new_empty(log_a.shape)
    call.out, call.d_out, call.d_x = _array(out), _array(d_out), _array(d_x)
    call.d_log, call.sums = _array(None if shared else d_log), d_log.data_ptr()
    call.d_final, call.d_state = d_final.data_ptr(), d_state.data_ptr()
    check(library().seqtrain_scan_backward(ctypes.byref(call)))
    return d_x, d_log.sum(0).to(log_a.dtype) if shared else d_log, d_state, None


def _describe(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[_Call, Any]:
    """The call, and what must outlive it."""
    shared, is_complex = log_a.dim() == 1, state.is_complex()
    # Of decays that differ from token to token the kernel takes the exponential itself, and saves writing it.
    decay = decay_of(log_a, state.dtype) if shared else log_a
    x, decay, state = _rows(x), decay.contiguous() if shared else _rows(decay), state.contiguous().resolve_conj()
    boundaries = find_boundaries(x, cu_seqlens)
    call = _Call(is_complex=is_complex, logarithms=not shared, threads=torch.get_num_threads())
    call.x, call.decay = _array(x), _array(None if shared else decay)
    call.shared = decay.data_ptr() if shared else None
    call.state, call.boundaries = state.data_ptr(), boundaries.data_ptr()
    call.documents, call.width = len(boundaries) - 1, x.shape[2] * (1 + is_complex)
    call.parts = max(1, -(-call.width // _BLOCK), min(call.threads, call.width // _LEAST))
    return call, (x, decay, state, boundaries)


def _rows(x: Tensor) -> Tensor:
    """`[B,T,D]` whose tokens are all as far apart, and whose channels lie side by side."""
    x = x.resolve_conj()
    [x] = by_token(x if x.stride(2) == 1 else x.contiguous())
    return x


def _array(x: Tensor | None) -> Array:
    """Of rows; complex numbers are pairs of floats."""
    if x is None or not x.is_complex():
        return Array.of(x, 0 if x is None else x.stride(1))
    return Array.of(torch.view_as_real(x), 2 * x.stride(1))


_operator = differentiable("diagonal_scan_native", _forward, _backward, _shapes, results=2, keep_results=True)
