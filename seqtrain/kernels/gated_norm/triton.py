"""Norm and gate by Triton kernels, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.gated_norm import gated_norm, token_rows
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example

__all__ = ["EXAMPLES", "run", "unavailable"]

# Numbers of a tile that four warps hold; wider rows take more warps.
TILE = 2048

_X = ("B T H V", "bfloat16")
_OWN = {"B": 1, "H": 8, "V": 128}


def _example(what: str, weight: str, gate: dict, sizes: dict, tokens: tuple[int, int], **options: Any) -> Example:
    tensors = {"x": _X, "weight": (weight, "float32"), **gate}
    return Example(f"gated_norm {what}", gated_norm, tensors, sizes, {"eps": 1e-6, **options}, tokens)


EXAMPLES = (
    _example("V=128 silu bfloat16", "V", {"gate": _X}, _OWN, (128, 256)),
    _example("8 groups gate first", "H V", {"gate": _X}, _OWN, (128, 256), gate_first=True),
    # As many programs for both: each writes sums for the weight.
    _example("V=4096 no gate bfloat16", "V", {}, {"B": 1, "H": 1, "V": 4096}, (264, 528)),
)


def _pinned(width: int) -> Launch:
    """The same on every target: rows of `width` numbers, whole."""
    columns = max(16, 1 << (width - 1).bit_length())
    warps = min(16, max(4, columns // 1024))
    return Launch(warps=warps, stages=1, sizes={"BR": max(1, TILE // columns), "BV": columns})


def run(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> Tensor:
    """See `gated_norm`."""
    return _operator(x, weight, gate, eps, silu, gate_first)[0]


def _shapes(x: Tensor, *_: Any) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, gate_first: bool) -> tuple[Tensor]:
    from seqtrain.kernels.triton import norm

    (out,) = _shapes(x)
    if not x.numel():
        return (out,)
    x, gate = token_rows(x), None if gate is None else token_rows(gate)
    launch, rows, groups, flags = _call(x, weight, out, silu, gate_first)
    numbers = (rows, x.stride(0), 0 if gate is None else gate.stride(0), eps)
    with gpu.on_device(x):
        grid = (-(-rows // launch.sizes["BR"]), groups)
        norm.forward[grid](x, weight.contiguous(), gate, out, *numbers, **launch.options(**flags))
    return (out,)


def _backward(
    arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    from seqtrain.kernels.triton import norm

    x, weight, gate, eps, silu, gate_first = arguments
    dx = x.new_empty(x.shape)
    d_gate = None if gate is None else gate.new_empty(gate.shape)
    if not x.numel():
        return dx, torch.zeros_like(weight), d_gate, None, None, None
    x, gate = token_rows(x), None if gate is None else token_rows(gate)
    launch, rows, groups, flags = _call(x, weight, dx, silu, gate_first)
    # As many programs as fill a GPU: each writes sums for the weight.
    tiles = -(-rows // launch.sizes["BR"])
    tiles_each = -(-tiles * groups // gpu.PROGRAMS)
    programs = -(-tiles // tiles_each)
    sums = weight.new_empty(programs, *weight.shape, dtype=_accumulator(x))
    tensors = (x, weight.contiguous(), gate, gradients[0].contiguous(), dx, d_gate, sums)
    numbers = (rows, tiles_each, x.stride(0), 0 if gate is None else gate.stride(0), eps)
    with gpu.on_device(x):
        norm.backward[programs, groups](*tensors, *numbers, **launch.options(**flags))
    return dx, sums.sum(0).to(weight.dtype), d_gate, None, None, None


def _call(
    x: Tensor, weight: Tensor, like: Tensor, silu: bool, gate_first: bool
) -> tuple[Launch, int, int, dict[str, Any]]:
    """Configuration, rows of a program's first dimension, programs of its second, and the kernels' flags."""
    heads, width = like.shape[-2:]
    shared = weight.dim() == 1
    flags = {"HEADS": heads, "V": width, "SHARED": shared, "SILU": silu, "GATE_FIRST": gate_first}
    flags["ACC"] = gpu.triton_dtype(_accumulator(x))
    return _pinned(width), x.shape[0] * (heads if shared else 1), 1 if shared else heads, flags


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_operator = differentiable("gated_norm_triton", _forward, _backward, _shapes, results=1)
