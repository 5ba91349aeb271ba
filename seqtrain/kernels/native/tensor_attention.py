"""Native tensor attention as a PyTorch operator: sums and states float32, inputs float32 or bfloat16, each its own."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.native.build import library
from seqtrain.kernels.native.calls import KINDS, Array, check, contiguous, fields, find_boundaries
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.tensor_attention.features import extensions, feature_count

_TOKENS = 64  # kTokens in tensor_attention.cpp
_ARRAYS = "q k1 k2 v1 v2 out d_out d_q d_k1 d_k2 d_v1 d_v2"


class _Call(ctypes.Structure):
    """`TensorCall` of tensor_attention.cpp."""

    _fields_ = fields(
        _ARRAYS,
        "state final_state checkpoints d_final d_state ratio parent variable boundaries",
        "documents tokens heads key value features threads",
    )


def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int) -> tuple[Tensor, Tensor]:
    """`tensor_attention` of inputs that are not float64."""
    tensors = [x if x.dtype in KINDS else x.float() for x in inputs]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, state))
    out, final = TENSOR_ATTENTION(*tensors, state, cu_seqlens, degree, scale, keep)
    return out, final


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, final_state, checkpoints)`; checkpoints are empty unless `keep`."""
    *tensors, cu_seqlens, degree, scale, keep = arguments
    out, final_state, checkpoints = _shapes(*arguments)
    *inputs, state = contiguous(*tensors)
    call, boundaries = _Call(), find_boundaries(inputs[0], cu_seqlens)
    _describe(call, inputs, boundaries, degree, scale)
    call.out = Array.of(out)
    call.state, call.final_state = state.data_ptr(), final_state.data_ptr()
    call.checkpoints = checkpoints.data_ptr() if keep else None
    check(library().seqtrain_tensor_forward(ctypes.byref(call)))
    return out, final_state, checkpoints


def _shapes(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, v1, _, state, *_, keep = others
    # As many places as blocks of these tokens can need, however documents are cut.
    places = q.shape[0] * q.shape[1] // _TOKENS + state.shape[0] if keep else 0
    return v1.new_empty(v1.shape), state.new_empty(state.shape), state.new_empty(places, *state.shape[1:])


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    *inputs, _, cu_seqlens, degree, scale, _ = arguments
    inputs, (d_out, d_final) = contiguous(*inputs), contiguous(*gradients)
    call, boundaries = _Call(), find_boundaries(inputs[0], cu_seqlens)
    _describe(call, inputs, boundaries, degree, scale)
    found, d_state = [torch.empty_like(x) for x in inputs], torch.empty_like(d_final)
    for name, tensor in zip(_ARRAYS.split()[6:], (d_out, *found), strict=True):
        setattr(call, name, Array.of(tensor))
    call.d_final, call.d_state = d_final.data_ptr(), d_state.data_ptr()
    call.checkpoints = kept[0].data_ptr()
    check(library().seqtrain_tensor_backward(ctypes.byref(call)))
    return *found, d_state, None, None, None, None


_SCHEMA = (
    "(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, Tensor state, "
    "Tensor? cu_seqlens, SymInt degree, float scale, bool keep) -> (Tensor, Tensor, Tensor)"
)
TENSOR_ATTENTION = differentiable("tensor_attention", _forward, _backward, _shapes, results=2, schema=_SCHEMA)


def _describe(call: _Call, inputs: list[Tensor], boundaries: Tensor, degree: int, scale: float) -> None:
    """Fills in what forward and backward share. `inputs`, contiguous, and `boundaries` must outlive the call."""
    for name, tensor in zip(_ARRAYS.split(), inputs, strict=False):
        setattr(call, name, Array.of(tensor))
    batch, tokens, call.heads, call.key = inputs[0].shape
    call.tokens, call.value, call.scale = batch * tokens, inputs[3].shape[3], scale
    call.features = feature_count(call.key, degree)
    parent, variable, ratio = _tables(call.key, degree)
    call.parent, call.variable, call.ratio = parent.data_ptr(), variable.data_ptr(), ratio.data_ptr()
    call.boundaries, call.documents = boundaries.data_ptr(), boundaries.shape[0] - 1
    call.threads = torch.get_num_threads()


@cache
def _tables(width: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feature: the one it extends, the variable it adds, and their weight; int64, int64, float32 `[F]`."""
    parents, variables, ratios = [0], [0], [1.0]
    shorter = 0
    for power in range(1, degree + 1):
        longer = len(parents)
        parent, variable, ratio = extensions(width, power, degree)
        parents += [shorter + index for index in parent]
        variables += variable
        ratios += ratio
        shorter = longer
    return torch.tensor(parents), torch.tensor(variables), torch.tensor(ratios, dtype=torch.float32)
