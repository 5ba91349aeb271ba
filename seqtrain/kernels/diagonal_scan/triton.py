"""The diagonal scan by a Triton kernel, forward and backward."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.diagonal_scan import diagonal_scan
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example
from seqtrain.kernels.operator import Inputs

__all__ = ["EXAMPLES", "run", "unavailable"]

# Least tokens of a piece of a document: splitting reads the inputs twice.
SHORTEST = 256

PINNED = {name: Launch(warps=4, stages=2, sizes={"BT": 32, "BD": 64}) for name in gpu.TARGETS}
PINNED_COMPLEX = {name: Launch(warps=4, stages=2, sizes={"BT": 16, "BD": 32}) for name in gpu.TARGETS}


def _example(what: str, width: int, dtype: str, log_a: str = "B T D", tokens: tuple[int, int] = (128, 256)) -> Example:
    state = ("B D", "complex64" if dtype == "complex64" else "float32")
    tensors = {"x": ("B T D", dtype), "log_a": (log_a, dtype), "initial_state": state}
    return Example(f"diagonal_scan D={width} {what}", diagonal_scan, tensors, {"B": 1, "D": width}, tokens=tokens)


EXAMPLES = (
    _example("bfloat16", 512, "bfloat16"),
    _example("float32 in pieces", 64, "float32", tokens=(1024, 2048)),
    _example("complex", 256, "complex64", "D"),
)


def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`."""
    out, final = _operator(*inputs, state, cu_seqlens)
    return out, final


def _shapes(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=state.dtype if state.is_complex() else x.dtype), state.new_empty(state.shape)


def _forward(x: Tensor, log_a: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    out, _ = _shapes(x, log_a, state, cu_seqlens)
    final = state.clone(memory_format=torch.contiguous_format)  # what an empty document leaves
    _scan(x, log_a, out=out, enters=state, leaves=final, boundaries=gpu.boundaries(x, cu_seqlens))
    return out, final


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    x, log_a, state, cu_seqlens = arguments
    d_out, d_final = gradients
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_state = d_final.clone(memory_format=torch.contiguous_format)
    boundaries = gpu.boundaries(x, cu_seqlens)
    d_log_a = _scan(
        d_out, log_a, out=dx, enters=d_final, leaves=d_state, boundaries=boundaries, back=(kept[0].contiguous(), state)
    )
    return dx, d_log_a, d_state, None


def _scan(
    u: Tensor,
    log_a: Tensor,
    *,
    out: Tensor,
    enters: Tensor,
    leaves: Tensor,
    boundaries: tuple[int, ...],
    back: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Launches `scan`; writes `out` and `leaves`. back: h and the initial state; then the gradient of log_a."""
    from seqtrain.kernels.triton import scan as kernels

    shared, width = log_a.dim() == 1, u.shape[2]
    is_complex = enters.is_complex()
    launch = (PINNED_COMPLEX if is_complex else PINNED)[gpu.target()]
    blocks = -(-width // launch.sizes["BD"])
    length = gpu.piece_length(boundaries, blocks, SHORTEST)
    table = gpu.pieces(boundaries, length, u.device)
    if not len(table):
        return None if back is None else torch.zeros_like(log_a)
    kept, state = back or (None, None)
    accumulator = enters.real.dtype
    d_log_a = None
    if back is not None and shared:
        d_log_a = log_a.new_empty(len(table), width, dtype=torch.promote_types(log_a.dtype, accumulator))
    elif back is not None:
        d_log_a = torch.empty(log_a.shape, dtype=log_a.dtype, device=log_a.device)
    cut = max(end - start for start, end in pairwise(boundaries)) > length
    totals = enters.new_empty(len(table), 2, width) if cut else None
    tensors = [_as_real(x) for x in (u, log_a, kept, state, enters, out, leaves, d_log_a, totals)]
    flags = {
        "ACC": gpu.triton_dtype(accumulator),
        "COMPLEX": is_complex,
        "U_COMPLEX": u.is_complex(),
        "A_COMPLEX": log_a.is_complex(),
        "OUT_COMPLEX": out.is_complex(),
        "A_SHARED": shared,
        "BACK": back is not None,
    }
    with gpu.on_device(u):
        for totals_only in (True, False) if cut else (False,):
            stage = {"TOTALS": totals_only, "LOOKBACK": cut and not totals_only}
            kernels.scan[len(table), blocks](*tensors, table, width, **launch.options(**flags, **stage))
    return d_log_a.sum(0).to(log_a.dtype) if shared and d_log_a is not None else d_log_a


def _as_real(x: Tensor | None) -> Tensor | None:
    """`x`, contiguous; its complex numbers as pairs, for Triton knows none."""
    if x is None or not x.is_complex():
        return x if x is None else x.contiguous()
    return torch.view_as_real(x.resolve_conj().contiguous())


_operator = differentiable("diagonal_scan_triton", _forward, _backward, _shapes, results=2, keep_results=True)
