"""The short convolution by Triton kernels, forward and backward; the backward computes its sums again."""

from typing import Any

from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.short_convolution import short_convolution

__all__ = ["EXAMPLES", "run", "unavailable"]

# Least rows of a piece of a document: each writes W sums per channel.
SHORTEST = 256

# Four warps spill 8 bytes per thread on sm_100.
PINNED = {
    name: Launch(warps=8 if name == "sm_100" else 4, stages=2, sizes={"BT": 32, "BD": 64}) for name in gpu.TARGETS
}

_INPUTS = {"x": ("B T D", "bfloat16"), "weight": ("D W", "float32")}

EXAMPLES = (
    Example(
        "short_convolution W=4 silu bfloat16",
        short_convolution,
        {**_INPUTS, "bias": ("D", "float32")},
        {"B": 1, "D": 256, "W": 4},
        {"activation": "silu"},
    ),
    Example("short_convolution W=2 bfloat16", short_convolution, _INPUTS, {"B": 1, "D": 256, "W": 2}),
)


def run(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
    """Triton's `short_convolution`."""
    out, final = _operator(*inputs, *others)
    return out, final


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from seqtrain.kernels.triton import convolution

    x, weight, bias, state, cu_seqlens, activation, dilation = arguments
    out, final = _shapes(*arguments)
    launch = PINNED[gpu.target()]
    blocks, table, boundaries = _grid(x, state, cu_seqlens, launch)
    tensors = [None if each is None else each.contiguous() for each in (x, weight, bias, state)]
    flags = {"DILATION": dilation, "SILU": activation == "silu", "ACC": gpu.triton_dtype(state.dtype)}
    options = launch.options(W=weight.shape[1], **flags)
    if len(table):
        with gpu.on_device(x):
            convolution.forward[len(table), blocks](*tensors, out, final, table, boundaries, x.shape[2], **options)
    return out, final


def _backward(
    arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    from seqtrain.kernels.triton import convolution

    x, weight, bias, state, cu_seqlens, activation, dilation = arguments
    d_out, d_final = gradients
    (width, taps), dtype = weight.shape, state.dtype
    dx, d_state = x.new_empty(x.shape), state.new_empty(state.shape)
    launch = PINNED[gpu.target()]
    blocks, table, boundaries = _grid(x, state, cu_seqlens, launch)
    d_weight = weight.new_empty(len(table), taps, width, dtype=dtype)
    d_bias = weight.new_empty(len(table), width, dtype=dtype)
    tensors = [None if each is None else each.contiguous() for each in (x, weight, bias, state, d_out, d_final)]
    flags = {"DILATION": dilation, "SILU": activation == "silu", "ACC": gpu.triton_dtype(dtype)}
    options = launch.options(W=taps, TAPS=1 << (taps - 1).bit_length(), **flags)
    written = (dx, d_state, d_weight, d_bias)
    if len(table):
        with gpu.on_device(x):
            convolution.backward[len(table), blocks](*tensors, *written, table, boundaries, width, **options)
    d_bias = None if bias is None else d_bias.sum(0).to(bias.dtype)
    return dx, d_weight.sum(0).T.to(weight.dtype), d_bias, d_state, None, None, None


def _grid(x: Tensor, state: Tensor, cu_seqlens: Tensor | None, launch: Launch) -> tuple[int, Tensor, Tensor]:
    """Blocks of channels, the pieces of documents with their pasts, and the documents' boundaries, int32 `[N+1]`."""
    boundaries = gpu.boundaries(x, cu_seqlens)
    blocks = -(-x.shape[2] // launch.sizes["BD"])
    length = gpu.piece_length(boundaries, blocks, SHORTEST)
    table = gpu.pieces(boundaries, length, x.device, past=state.shape[1])
    return blocks, table, gpu.boundaries_tensor(boundaries, x.device)


_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor state, "
    "Tensor? cu_seqlens, str activation, SymInt dilation) -> (Tensor, Tensor)"
)
_operator = differentiable("short_convolution_triton", _forward, _backward, _shapes, results=2, schema=_SCHEMA)
