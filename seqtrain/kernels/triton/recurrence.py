"""Launches the kernels of `matrix`, `matrix_chunks` and `cuts`: linear attention and the delta rule, differentiable.

Backward, states and E are computed again from the inputs; of the forward pass only the delta rule's inverses are kept,
C numbers per token and head, and the sums of decays, one. A single token per row is one launch of `step`. Documents
that would leave most of a GPU idle are cut: two launches more, forward and backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.documents import boundaries_of
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.triton import cuts, matrix, matrix_chunks
from seqtrain.kernels.triton.matrix_launches import LONGEST, chunk_length, piece_chunks, pinned

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
        if call.plan.is_step:
            call.launch(
                matrix.step, call.q, call.k, call.v, call.beta, call.log_decay, out, call.state, final, call.scale
            )
        else:
            made = call.operands(inverse, sums, known=False)
            starts, _ = call.cut(made, None, None)
            written = (out, None, None, starts, final)
            call.launch(matrix.forward, made, call.v, call.beta, *written, call.plan.pieces, call.scale)
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
    states = call.q.new_empty(call.plan.chunks.shape[0], *call.state.shape[1:])
    d_states = torch.empty_like(states)
    errors = None if call.beta is None else torch.empty_like(call.v, dtype=call.q.dtype)
    known = not call.plan.is_step  # a step leaves them to be found
    inverse, sums = kept if known else (torch.empty_like(x) for x in kept)
    with gpu.on_device(call.q):
        made = call.operands(inverse, sums, known=known)
        starts, ends = call.cut(made, d_out, d_final)
        others = (call.plan.pieces, call.scale)
        call.launch(matrix.forward, made, call.v, call.beta, None, errors, states, starts, None, *others)
        call.launch(matrix.reverse, made, call.beta, d_out, d_v, d_states, ends, d_state, *others)
        del made, starts, ends
        inputs = (call.q, call.k, call.beta, call.log_decay, sums if call.decay == 1 else None)
        given = (call.v if errors is None else errors, d_out, d_v, states, d_states)
        written = (d_q, d_k, d_beta, d_log)
        call.launch(matrix_chunks.gradients, *inputs, given, *written, call.plan.chunks, call.scale)
    return d_q, d_k, d_v, d_beta, d_log, d_state, None, None


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


@dataclass(frozen=True, eq=False)
class _Plan:
    """What calls of the same shapes, dtypes and boundaries share: tables on the device, and their launches.

    mapped: the rows of `pieces` whose documents are cut; None where none is. documents: those of `cuts.carry`.
    """

    widths: tuple[int, int, int]
    dtype: torch.dtype
    state_dtype: torch.dtype
    decay: int
    delta: bool
    target: str
    chunk: int
    is_step: bool
    chunks: Tensor
    pieces: Tensor
    mapped: Tensor | None
    documents: Tensor
    _launches: dict[Any, gpu.BoundKernel] = field(default_factory=dict, repr=False)

    def kernel(self, kernel: Any, *, both: bool = False) -> gpu.BoundKernel:
        """The launch of a kernel; both: of those of `cuts`, in both directions."""
        found = self._launches.get((kernel, both))
        if found is None:
            found = self._launches[kernel, both] = self._bind(kernel, both)
        return found

    def _bind(self, kernel: Any, both: bool) -> gpu.BoundKernel:
        heads, key, value = self.widths
        width = triton.next_power_of_2(max(key, 16))
        options = {"delta": self.delta, "cut": self.mapped is not None}
        launch = pinned(self.target, kernel.__name__, width, self.dtype, self.decay, **options)
        blocks = triton.cdiv(value, launch.sizes.get("BV", value))
        if kernel in (matrix_chunks.prepare, matrix_chunks.gradients):
            places, blocks = self.chunks.shape[0], 1
        elif kernel is cuts.maps:
            assert self.mapped is not None
            keys = triton.cdiv(key, launch.sizes["BV"]) if self.delta else 0
            places, blocks = self.mapped.shape[0], blocks * (1 + both) + keys
        elif kernel is cuts.carry:
            places, blocks = self.documents.shape[0], blocks * (1 + both)
        else:
            places = self.pieces.shape[0]
        flags = {"DECAY": self.decay, "DELTA": self.delta, "PRECISION": gpu.PRECISION[self.target]}
        options = launch.options(H=heads, K=key, V=value, ACC=gpu.triton_dtype(self.state_dtype), **flags)
        return gpu.BoundKernel(kernel, places * heads * blocks, options)


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
    plan: _Plan

    @classmethod
    def of(cls, *arguments: Any) -> "_Call":
        """Of the arguments of `_forward`."""
        *tensors, scale, cu_seqlens = arguments
        tensors = [x if x is None else x.contiguous() for x in tensors]
        q, k, v, beta, log_decay, state = tensors
        boundaries = None if cu_seqlens is None else boundaries_of(cu_seqlens)
        decay = 0 if log_decay is None else log_decay.dim() - 2
        kinds = q.dtype, state.dtype, decay, beta is not None
        plan = _plan(q.shape, v.shape[3], *kinds, boundaries, gpu.machine_of(q), q.device)
        return cls(q, k, v, beta, log_decay, state, scale, plan)

    @property
    def decay(self) -> int:
        """DECAY of the kernels."""
        return self.plan.decay

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
            pairs = self.q.new_empty(*self.q.shape[:3], self.plan.chunk)
            factors = self.state.new_empty(self.plan.chunks.shape[0], *self.q.shape[2:])
            decayed = [torch.empty_like(self.q), torch.empty_like(self.k), asked, pairs, factors]
        written = (made_sums, None if known else made_inverse, *decayed, self.plan.chunks, self.scale)
        self.launch(matrix_chunks.prepare, self.q, self.k, self.beta, self.log_decay, *written)
        return *decayed[:2], None, made_sums, made_inverse, *decayed[2:]

    def cut(
        self, made: tuple[Tensor | None, ...], d_out: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The state before each piece and, where gradients are given, that of the state after each piece."""
        if self.plan.mapped is None:
            return self.state, d_final
        both, count = d_out is not None, self.plan.mapped.shape[0]
        heads, key, value = self.plan.widths
        factors = {0: (0,), 1: (count, heads), 2: (count, heads, key)}[self.decay]
        transition = self.state.new_empty((count, heads, key, key) if self.plan.delta else factors)
        starts, update = (self.state.new_empty(n, heads, key, value) for n in (self.plan.pieces.shape[0], count))
        ends, d_update = (torch.empty_like(x) if both else None for x in (starts, update))
        written = (transition, update, d_update, self.plan.mapped, self.scale)
        self.launch(cuts.maps, made, self.v, self.beta, d_out, *written, both=both)
        tensors = (transition, update, self.state, starts, d_update, d_final, ends, self.plan.documents)
        self.launch(cuts.carry, *tensors, both=both)
        return starts, ends

    def launch(self, kernel: Any, *arguments: Any, both: bool = False) -> None:
        self.plan.kernel(kernel, both=both)(*arguments)


# A training step has one set of boundaries in all its layers, forward and backward; evaluation adds a few.
@lru_cache(maxsize=64)
def _plan(
    shape: torch.Size,
    value: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    decay: int,
    delta: bool,
    boundaries: tuple[int, ...] | None,
    machine: gpu.Machine,
    device: torch.device,
) -> _Plan:
    batch, tokens, heads, key = shape
    is_step = tokens == 1 and boundaries is None
    if boundaries is None:
        boundaries = tuple(row * tokens for row in range(batch + 1))
    chunk = chunk_length(machine.target, dtype)
    lengths = [-(-(end - start) // chunk) for start, end in pairwise(boundaries)]
    width = triton.next_power_of_2(max(key, 16))
    columns = [
        pinned(machine.target, "forward", width, dtype, decay, delta=delta, cut=cut).sizes["BV"]
        for cut in (False, True)
    ]
    narrow, wide = (heads * triton.cdiv(value, each) for each in columns)
    length = piece_chunks(lengths, narrow, wide, machine.multiprocessors, delta=delta)
    pieces, mapped, documents = (_table(x, device) for x in _tables(boundaries, lengths, chunk, length))
    return _Plan(
        widths=(heads, key, value),
        dtype=dtype,
        state_dtype=state_dtype,
        decay=decay,
        delta=delta,
        target=machine.target,
        chunk=chunk,
        is_step=is_step,
        chunks=gpu.pieces(boundaries, chunk, device),
        pieces=pieces,
        mapped=mapped if len(mapped) else None,
        documents=documents,
    )


def _tables(
    boundaries: tuple[int, ...], lengths: Sequence[int], chunk: int, length: int
) -> tuple[list[tuple[int, ...]], ...]:
    """Rows of `pieces`, `mapped`, `documents` of a plan; lengths: chunks of each document; length: of a piece, or 0."""
    pieces: list[tuple[int, ...]] = []
    mapped: list[tuple[int, ...]] = []
    documents: list[tuple[int, ...]] = []
    first_chunk = 0
    for document, ((start, end), chunks) in enumerate(zip(pairwise(boundaries), lengths, strict=True)):
        # An empty document is a piece, too: its state goes through.
        edges = [*range(0, chunks, length or max(chunks, 1)), chunks] if chunks else [0, 0]
        documents.append((len(pieces), len(edges) - 1, len(mapped)))
        rows = []
        for begin, stop in pairwise(edges):
            token = start + begin * chunk
            tokens = min(end, start + stop * chunk) - token
            opens, closes = (document if holds else -1 for holds in (begin == 0, stop == chunks))
            rows.append((token, tokens, first_chunk + begin, opens, closes))
        pieces += rows
        mapped += rows if len(rows) > 1 else []
        first_chunk += chunks
    return pieces, mapped, documents


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)
