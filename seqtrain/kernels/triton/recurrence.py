"""Launches the kernels of `matrix` and `matrix_chunks`: linear attention and the delta rule, differentiable.

Backward, states and E are computed again from the inputs; of the forward pass only the delta rule's inverses are kept,
C numbers per token and head, and the sums of decays, one. A single token per row is one launch of `step`.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.triton import matrix, matrix_chunks
from seqtrain.kernels.triton.matrix_launches import LONGEST, chunk_length, pinned

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`delta_rule`, or `linear_attention` without a beta; inputs: q, k, v, beta and log_decay."""
    q, k, *others = inputs
    dtype = torch.promote_types(q.dtype, k.dtype)
    dtype = dtype if dtype in _DTYPES else torch.float32
    out, final = _recurrence(q.to(dtype), k.to(dtype), *others, state, scale, cu_seqlens)
    return out, final


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, final_state, inverse, sums)`: the last two for the backward pass, see `_empty_kept`."""
    call = _Call.of(*arguments)
    out, final, inverse, sums = _shapes(*arguments)
    with gpu.on_device(out):
        if _is_step(call.q, arguments[-1]):
            call.launch(matrix.step, call.q, call.k, call.v, call.beta, call.log_decay, out, call.state, final)
        else:
            made = call.operands(inverse, sums, known=False)
            call.launch(matrix.forward, made, call.v, call.beta, out, None, None, call.state, final, call.documents)
    return out, final, inverse, sums


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, final = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, state))
    return out, final, *_empty_kept(q, beta, log_decay)


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], given: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `_forward`."""
    call = _Call.of(*arguments)
    d_out, d_final = (x.contiguous() for x in given)
    d_q, d_k, d_v, d_state = (torch.empty_like(x) for x in (call.q, call.k, call.v, call.state))
    d_beta, d_log = (None if x is None else torch.empty_like(x) for x in (call.beta, call.log_decay))
    states = call.q.new_empty(call.chunks.shape[0], *call.state.shape[1:])
    d_states = torch.empty_like(states)
    errors = None if call.beta is None else torch.empty_like(call.v, dtype=call.q.dtype)
    known = not _is_step(call.q, arguments[7])  # a step leaves them to be found
    inverse, sums = kept if known else (torch.empty_like(x) for x in kept)
    with gpu.on_device(call.q):
        made = call.operands(inverse, sums, known=known)
        call.launch(matrix.forward, made, call.v, call.beta, None, errors, states, call.state, None, call.documents)
        call.launch(matrix.reverse, made, call.beta, d_out, d_v, d_states, d_final, d_state, call.documents)
        del made
        inputs = (call.q, call.k, call.beta, call.log_decay, sums if call.decay == 1 else None)
        given = (call.v if errors is None else errors, d_out, d_v, states, d_states)
        call.launch(matrix_chunks.gradients, *inputs, given, d_q, d_k, d_beta, d_log, call.chunks)
    return d_q, d_k, d_v, d_beta, d_log, d_state, None, None


def _is_step(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    return q.shape[1] == 1 and cu_seqlens is None


def _empty_kept(q: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for `inverse` and `sums` of the kernels; empty where there are none.

    `inverse` `[tokens, H, LONGEST]`: of the longest chunk, so that its shape depends on no GPU; shorter ones take less
    of its memory. `sums` `[tokens, H]`: float64.
    """
    inverse = q.new_empty(0 if beta is None else (*beta.shape, LONGEST))
    sums = log_decay.shape if log_decay is not None and log_decay.dim() == 3 else (0,)
    return inverse, q.new_empty(sums, dtype=torch.float64)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? log_decay, Tensor state, float scale, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)"
)
_recurrence = differentiable("matrix_recurrence", _forward, _backward, _shapes, results=2, schema=_SCHEMA)


def _contiguous(tensor: Any) -> Any:
    return tensor if tensor is None else tensor.contiguous()


@dataclass
class _Call:
    """The inputs of a call, contiguous, and what all its launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    state: Tensor
    scale: float
    chunks: Tensor
    documents: Tensor
    chunk: int
    target: str

    @classmethod
    def of(cls, q: Tensor, *arguments: Any) -> "_Call":
        """Of the arguments of `_forward`."""
        *others, scale, cu_seqlens = arguments
        boundaries, target = gpu.boundaries(q, cu_seqlens), gpu.target()
        chunk = chunk_length(target, q.dtype)
        k, v, beta, log_decay, state = map(_contiguous, others)
        chunks = gpu.pieces(boundaries, chunk, q.device)
        documents = _documents(boundaries, chunk, q.device)
        return cls(q.contiguous(), k, v, beta, log_decay, state, scale, chunks, documents, chunk, target)

    @property
    def decay(self) -> int:
        """DECAY of the kernels."""
        return 0 if self.log_decay is None else self.log_decay.dim() - 2

    def operands(self, inverse: Tensor, sums: Tensor, *, known: bool) -> tuple[Tensor | None, ...]:
        """What the kernels that go from chunk to chunk multiply with, their `made`; None of a form that has none.

        Runs `prepare` where there is something to prepare; writes `inverse` and `sums` unless they are `known`.
        """
        made_sums, made_inverse = sums if self.decay == 1 else None, None if self.beta is None else inverse
        if self.decay < 2 and (known or self.beta is None):
            # `forward` finds sums that are not known as it goes: a launch less.
            return self.q, self.k, None if known else self.log_decay, made_sums, made_inverse, None, None, None
        decayed: list[Tensor | None] = [self.q, self.k, None, None, None]
        if self.decay == 2:
            asked = None if self.beta is None else torch.empty_like(self.k)
            pairs = self.q.new_empty(*self.q.shape[:3], self.chunk)
            factors = self.state.new_empty(self.chunks.shape[0], *self.q.shape[2:])
            decayed = [torch.empty_like(self.q), torch.empty_like(self.k), asked, pairs, factors]
        written = (made_sums, None if known else made_inverse, *decayed)
        self.launch(matrix_chunks.prepare, self.q, self.k, self.beta, self.log_decay, *written, self.chunks)
        return *decayed[:2], None, made_sums, made_inverse, *decayed[2:]

    def launch(self, kernel: Any, *tensors: Any) -> None:
        heads, key, value = self.v.shape[2], self.q.shape[3], self.v.shape[3]
        width, delta = triton.next_power_of_2(max(key, 16)), self.beta is not None
        launch = pinned(self.target, kernel.__name__, width, self.q.dtype, self.decay, delta=delta)
        places, blocks = self.state.shape[0], triton.cdiv(value, launch.sizes.get("BV", value))
        if kernel in (matrix_chunks.prepare, matrix_chunks.gradients):
            places, blocks = self.chunks.shape[0], 1
        flags = {"DECAY": self.decay, "DELTA": delta, "PRECISION": gpu.PRECISION[self.target]}
        options = launch.options(H=heads, K=key, V=value, ACC=gpu.triton_dtype(self.state.dtype), **flags)
        kernel[(places * heads * blocks,)](*tensors, self.scale, **options)


# A training step has one set of boundaries in all its layers, forward and backward; evaluation adds a few.
@lru_cache(maxsize=16)
def _documents(boundaries: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """`documents` of the kernels, for documents between these boundaries."""
    rows, chunks = [], 0
    for start, end in pairwise(boundaries):
        rows.append((start, end - start, chunks))
        chunks += -(-(end - start) // chunk)
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)
