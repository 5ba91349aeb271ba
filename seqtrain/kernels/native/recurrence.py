"""The native recurrence as two PyTorch operators, forward and backward, for linear attention and the delta rule.

Sums and states are float32. Inputs may be float32 or bfloat16, each its own; other dtypes are converted by `run`.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.chunk_form import chunk_length
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.native import cut
from seqtrain.kernels.native.build import library
from seqtrain.kernels.native.calls import KINDS, Array, by_token, check, fields, find_boundaries
from seqtrain.kernels.operator import Inputs

# Numbers that the recomputed chunks between two saved states may take: 1 MB, half of a usual second-level cache.
GROUP_NUMBERS = 1 << 18
# Most chunks between two saved states.
GROUP_CHUNKS = 32
# Least columns of a block, where heads are so few that the values of one are divided among threads: half of a head
# of K = V = 32 takes 0.75 of its time, and the other half runs in parallel.
BLOCK_COLUMNS = 16
_BLOCK = 16  # kBlock in simd.h


class _Call(ctypes.Structure):
    """`Call` of recurrence.cpp."""

    _fields_ = fields(
        "q k v beta log_decay out d_out d_q d_k d_v d_beta d_log",
        "state final_state checkpoints d_final d_state boundaries",
        "documents tokens heads key value chunk every value_blocks threads decay",
    )


def serves(inputs: Inputs, state: Tensor | None, *_: Any) -> bool:
    """Whether the library takes a call: not in float64."""
    return torch.float64 not in [x.dtype for x in (inputs[1:3] if state is None else (state,))]


def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`linear_attention`, or `delta_rule` where there is a beta, too."""
    inputs = _with_beta(inputs)
    q, v = inputs[0], inputs[2]
    chunk = chunk_length(q.shape[3], v.shape[3])
    blocks = q.shape[0] * q.shape[2] * max(1, v.shape[3] // BLOCK_COLUMNS)
    pieces = 1 if cu_seqlens is not None else cut.count_pieces(blocks, q.shape[1], chunk)
    if pieces == 1:
        return _run_whole(inputs, state, scale, cu_seqlens)
    length = q.shape[1] // (pieces * chunk) * chunk * pieces
    out, state = cut.run_pieces([x if x is None else x[:, :length] for x in inputs], state, scale, pieces)
    rest, state = _run_whole([x if x is None else x[:, length:] for x in inputs], state, scale, None)
    return torch.cat([out, rest], 1), state


def find_map(inputs: Inputs, no_state: None) -> tuple[Tensor | None, Tensor]:
    """`(transition, update)` of `linear_attention`: the update is its final state from zeros, without its outputs."""
    _, k, v, log_decay = inputs
    state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    _, update = _run_whole(_with_beta(inputs), state, 1.0, None)
    return None if log_decay is None else log_decay.contiguous().sum(1, dtype=torch.float32).exp(), update


def read(inputs: Inputs, state: Tensor, scale: float) -> Tensor:
    """Outputs `[B,T,H,V]`, which stand in the place of v, and what q reads in the incoming state, without k."""
    return _run_whole(_with_beta(inputs), state.float(), scale, None)[0]


def _with_beta(inputs: Inputs) -> Inputs:
    """`(q, k, v, beta, log_decay)` of those of `delta_rule` or `linear_attention`."""
    return inputs[:5] if len(inputs) > 4 else (*inputs[:3], None, inputs[3])


def _run_whole(inputs: Inputs, state: Tensor, scale: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with rows not split in time; inputs: q, k, v, beta and log_decay, see `_forward`."""
    tensors = [x if x is None or x.dtype in KINDS else x.float() for x in inputs]
    given = [x for x in (*tensors, state) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    out, final_state = RECURRENCE(*tensors, state, cu_seqlens, scale, keep)
    return out.to(inputs[2].dtype), final_state


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, final_state, checkpoints)`; checkpoints are empty unless `keep`.

    Without a beta, q or k may be missing. Without q, out is empty. Without k, nothing is written to the state, and out
    is v and what q reads.
    """
    *tensors, cu_seqlens, scale, keep = arguments
    (q, k, v, beta, log_decay), state = by_token(*tensors[:5]), tensors[5].contiguous()
    out, final_state, checkpoints = _shapes(*arguments)
    call = _describe(q, k, v, beta, log_decay, scale)
    boundaries = find_boundaries(v, cu_seqlens)
    _set_documents(call, boundaries, v.shape[2])
    call.out = Array.of(out)
    call.state, call.final_state = state.data_ptr(), final_state.data_ptr()
    call.checkpoints = checkpoints.data_ptr() if keep else None
    check(library().seqtrain_forward(ctypes.byref(call)))
    return out, final_state, checkpoints


def _shapes(q: Tensor | None, k: Tensor | None, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, state, _, _, keep = others
    out = v.new_empty(0 if q is None else v.shape)
    return out, state.new_empty(state.shape), state.new_empty(_checkpoint_shape(v, state, keep))


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, _, cu_seqlens, scale, _ = arguments
    q, k, v, beta, log_decay, d_out = by_token(q, k, v, beta, log_decay, gradients[0])
    d_final = gradients[1].contiguous()
    call = _describe(q, k, v, beta, log_decay, scale)
    boundaries = find_boundaries(v, cu_seqlens)
    _set_documents(call, boundaries, v.shape[2])
    d_v, d_state = d_out.contiguous() if k is None else v.new_empty(v.shape), torch.empty_like(d_final)
    blocks = call.value_blocks
    parts = [
        None if x is None else x.new_empty(blocks, *x.shape, dtype=x.dtype if blocks == 1 else torch.float32)
        for x in (q, k, beta, log_decay)
    ]
    call.d_q, call.d_k, call.d_beta, call.d_log = (Array.of(x) for x in parts)
    call.d_out, call.d_v = Array.strided(d_out), Array.of(None if k is None else d_v)
    call.d_final, call.d_state = d_final.data_ptr(), d_state.data_ptr()
    call.checkpoints = kept[0].data_ptr()
    check(library().seqtrain_backward(ctypes.byref(call)))
    d_q, d_k, d_beta, d_log = (
        None if part is None or x is None else part[0] if blocks == 1 else part.sum(0).to(x.dtype)
        for part, x in zip(parts, (q, k, beta, log_decay), strict=True)
    )
    return d_q, d_k, d_v, d_beta, d_log, d_state, None, None, None


_SCHEMA = (
    "(Tensor? q, Tensor? k, Tensor v, Tensor? beta, Tensor? log_decay, Tensor state, "
    "Tensor? cu_seqlens, float scale, bool keep) -> (Tensor, Tensor, Tensor)"
)
RECURRENCE = differentiable("recurrence", _forward, _backward, _shapes, results=2, schema=_SCHEMA)


def _group(key: int, value: int) -> tuple[int, int]:
    """Tokens a chunk, and chunks from one saved state to the next."""
    chunk = chunk_length(key, value)
    numbers = key * value + chunk * (value + chunk)
    return chunk, max(1, min(GROUP_CHUNKS, GROUP_NUMBERS // numbers))


def _checkpoint_shape(v: Tensor, state: Tensor, keep: bool) -> tuple[int, ...]:
    """`[places, H, K, V]`: as many places as documents of these tokens can need, however they are cut."""
    if not keep:
        return (0,)
    chunk, every = _group(*state.shape[2:])
    return (v.shape[0] * v.shape[1] // (chunk * every) + state.shape[0], *state.shape[1:])


def _describe(
    q: Tensor | None, k: Tensor | None, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, scale: float
) -> _Call:
    key = next(x.shape[3] for x in (q, k) if x is not None)
    call = _Call(scale=scale, tokens=v.shape[0] * v.shape[1], heads=v.shape[2], key=key, value=v.shape[3])
    call.q, call.k, call.v, call.beta, call.log_decay = (Array.strided(x) for x in (q, k, v, beta, log_decay))
    call.decay = 0 if log_decay is None else log_decay.dim() - 2
    call.chunk, call.every = _group(call.key, call.value)
    return call


def _set_documents(call: _Call, boundaries: Tensor, heads: int) -> None:
    """Says which tokens belong together, and how the work is cut. `boundaries` must outlive the call."""
    call.boundaries, call.documents = boundaries.data_ptr(), boundaries.shape[0] - 1
    call.threads = torch.get_num_threads()
    wanted = -(-call.threads // (call.documents * heads))
    wanted = max(1, min(wanted, call.value // BLOCK_COLUMNS))
    width = -(-call.value // wanted)
    width = -(-width // _BLOCK) * _BLOCK
    call.value_blocks = -(-call.value // width)
