"""Tensor attention with its products inside chunks by Triton kernels; all else is that of the chunked form.

Features, what enters each chunk, and the division stay PyTorch's, in float32: 3 to 4 times the bytes that would do.
"""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention import tensor_attention
from seqtrain.kernels.tensor_attention.chunked import STEP, Piece, Products, attend, from_steps

__all__ = ["EXAMPLES", "run", "serves", "unavailable"]

# Numbers in each of the two running sums of a segment: 64 MiB of float32.
SEGMENT = 1 << 24
# Features that the kernels take (K=4 has 15); more go to the chunked form: 64 spill 64 bytes per thread on sm_90.
MOST_FEATURES = 16

# By kernel, chosen by what they compile to: nothing spilled on any of the GPUs, then few registers.
PINNED = {
    "outputs": Launch(warps=4, stages=1, sizes={"BW": 32, "TG": 2}),
    "gradients": Launch(warps=4, stages=1, sizes={"BW": 16, "TG": 1}),
}


def _example(name: str, width: int, dtype: str) -> Example:
    inputs = dict.fromkeys(("q", "k1", "k2"), ("B T H K", dtype)) | dict.fromkeys(("v1", "v2"), ("B T H V", dtype))
    return Example(name, tensor_attention, inputs, {"B": 1, "H": 1, "K": width, "V": 64})


EXAMPLES = (_example("tensor_attention K=4 V=64 bfloat16", 4, "bfloat16"),)


def serves(_: Inputs, state: Tensor, *others: Any) -> bool:
    """Whether the kernels take so many features."""
    return state.shape[3] <= MOST_FEATURES


@tensor_attention.backend(like=lambda inputs, state: inputs[3].to(state.dtype))
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    """See `tensor_attention`; `out` comes back in the state's dtype."""
    return attend(inputs, state, cu_seqlens, scale, degree, Products(_outputs, _gradients, SEGMENT))


def _outputs(piece: Piece, sums: Tensor) -> Tensor:
    """`chunked._outputs` by a kernel."""
    from seqtrain.kernels.triton import pairs

    out = piece.q.new_empty(*piece.q.shape[:3], piece.v.shape[-1])
    grid, sizes, options = _call(piece, "outputs")
    with gpu.on_device(out):
        pairs.outputs[grid](piece.q, piece.k, piece.v, sums, out, *sizes, **options)
    return from_steps(out)


def _gradients(piece: Piece, sums: Tensor, d_out: Tensor) -> tuple[Piece, Tensor]:
    """`chunked._gradients` by a kernel."""
    from seqtrain.kernels.triton import pairs

    grid, sizes, options = _call(piece, "gradients")
    blocks = grid[1]
    d_q, d_k = piece.q.new_empty(blocks, *piece.q.shape), piece.k.new_empty(blocks, *piece.k.shape)
    d_v, d_sums = torch.empty_like(piece.v), torch.empty_like(sums)
    with gpu.on_device(d_q):
        pairs.gradients[grid](piece.q, piece.k, piece.v, sums, d_out, d_q, d_k, d_v, d_sums, *sizes, **options)
    return Piece(d_q.sum(0), d_k.sum(0), d_v), d_sums


def _call(piece: Piece, kernel: str) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid; lanes, steps, features and columns; compile-time arguments."""
    steps, lanes, _, width = piece.q.shape
    columns = piece.v.shape[-1]
    launch = PINNED[kernel]
    accumulator, precision = gpu.triton_dtype(piece.q.dtype), gpu.PRECISION[gpu.target()]
    options = launch.options(C=STEP, BF=MOST_FEATURES, ACC=accumulator, PRECISION=precision)
    return (lanes, -(-columns // launch.sizes["BW"])), (lanes, steps, width, columns), options
