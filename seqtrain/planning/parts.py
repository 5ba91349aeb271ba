"""Each kind of part of a model, traced once on tensors without values, forward and backward."""

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqtrain.kernels.affine import AffineShape
from seqtrain.kernels.operator import Operator
from seqtrain.kernels.segments import AffineScan, PastInputs, Relayed
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.language_model import Block
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.planning.trace import Calls, Recorded, Tracer

# Longer sequences are not traced: two shorter ones are, of layers whose work grows in proportion to the tokens.
TRACED = (2048, 4096)
# Sequence on which the chunk form of an operator with a kernel of its own is traced, for its FLOPs.
CHUNKED = (512, 1024)
# Blocks below this size the C library's allocator keeps, larger ones it returns (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
SMALL = 32 * 2**20


@dataclass(frozen=True)
class MicroBatch:
    """What runs through the model at once: `rows` sequences of `tokens`, products in `dtype`, operators' `backend`."""

    tokens: int
    rows: int
    dtype: torch.dtype
    backend: str


@dataclass(frozen=True)
class Exchange:
    """What an operator sends one way where the sequence is sharded over ranks: a scan of states of this `shape` in
    numbers of `item` bytes; or `near` bytes from the neighbor; or `spread` bytes, this rank's part of what all send.
    """

    shape: AffineShape | None = None
    item: int = 4
    near: float = 0.0
    spread: float = 0.0

    def of_rows(self, rows: int) -> "Exchange":
        """For so many rows at once."""
        shape = self.shape
        if shape is not None:
            more = "columns" if shape.identity else "rows"
            shape = dataclasses.replace(shape, **{more: getattr(shape, more) * rows})
        return Exchange(shape, self.item, self.near * rows, self.spread * rows)


@dataclass(frozen=True)
class RecordingContext(SequenceContext):
    """A whole sequence that notes its operators' windows, and what they would exchange if it were sharded."""

    exchanges: list[Exchange] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def run(self, operator: Any, *tensors: Any, initial_state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        self.exchanges.append(_exchange(operator, tensors, options))
        window = options.get("window")
        if window is not None:
            self.windows.append(window)
        return super().run(operator, *tensors, initial_state=initial_state, **options)


def _exchange(operator: Operator, tensors: tuple[Any, ...], options: dict[str, Any]) -> Exchange:
    first, time = tensors[0], operator.time
    if isinstance(time, AffineScan):
        shape, dtype = operator.state_shape(tensors, options, first.shape[0])
        return Exchange(AffineShape.of(shape, time.segment.transition_shape(tensors, options)), dtype.itemsize)
    if isinstance(time, PastInputs):
        return Exchange(near=first[:, :1].nbytes * time.count(tensors, options))
    if isinstance(time, Relayed):
        return Exchange()
    window = options.get("window")
    keys = tensors[1].nbytes + tensors[2].nbytes
    if window is not None and window <= first.shape[1]:
        return Exchange(near=keys * window / first.shape[1])
    # Queries, keys, values and outputs change from being sharded in time to being sharded by heads, and back.
    return Exchange(spread=keys + 2 * first.nbytes)


@dataclass(frozen=True)
class Traced:
    """Forward and backward pass of a part: what its code does and the bytes it holds. `executed_forward`,
    `executed_backward`: FLOPs of matrix products of the chunk forms, or of kernels like them, that really run.
    `gradient_bytes`: of the parameters whose gradients it is the first to make. `exchanges`: what its operators send
    where the sequence is sharded. `windows`: of its operators, in tokens.
    """

    forward: Recorded
    backward: Recorded
    executed_forward: float
    executed_backward: float
    gradient_bytes: int
    exchanges: tuple[Exchange, ...] = ()
    windows: tuple[int, ...] = ()


def trace_layer(model: ModelConfig, mixers: Mapping[str, Any], index: int, batch: MicroBatch) -> tuple[Traced, Traced]:
    """The mixer of layer `index` with its norm and its sum with the residual stream, and the MLP with its own."""

    def build() -> nn.Module:
        return LanguageModel(dataclasses.replace(model, depth=index + 1), mixers, 1).blocks[index]

    trace = partial(_trace_mixer, build, model.width)
    mixer = _at(batch, trace, _lengths(build, trace, batch.tokens, TRACED))
    if any(name.startswith("seqtrain.") for name in mixer.forward.calls):
        # A kernel of its own does what the chunk form does, unseen.
        chunked = dataclasses.replace(batch, backend="chunked")
        chunks = _at(chunked, trace, _lengths(build, trace, batch.tokens, CHUNKED))
        mixer = dataclasses.replace(
            mixer, executed_forward=chunks.executed_forward, executed_backward=chunks.executed_backward
        )
    mlp = partial(_trace, build, lambda block, x: x + block.mlp(block.mlp_norm(x)), model.width)
    return mixer, _at(batch, mlp, TRACED)


def trace_outside(model: ModelConfig, vocab_size: int, batch: MicroBatch) -> tuple[Traced, Traced]:
    """The embedding, and the last norm with the head and the loss."""

    def indices(x: Tensor) -> Tensor:
        return torch.zeros(x.shape[:2], dtype=torch.int64)

    def build() -> nn.Module:
        # A model of the least layers, for its norm and head.
        one = dataclasses.replace(model, layers=("attention",), depth=1, width=model.width, groups=(0,))
        return LanguageModel(one, {"attention": MIXERS.get("attention").Config()}, vocab_size)

    embedding = partial(_trace, lambda: nn.Embedding(vocab_size, model.width), lambda table, x: table(indices(x)), 0)
    loss = partial(_trace, build, lambda whole, x: whole.head(whole.norm(x), indices(x)), model.width)
    return _at(batch, embedding, TRACED), _at(batch, loss, TRACED)


def _trace_mixer(build: Callable[[], nn.Module], width: int, batch: MicroBatch, small: float) -> Traced:
    sequence = RecordingContext(backend=batch.backend)

    def run(block: Any, x: Tensor) -> Tensor:
        return x + block._mix(block.mixer_norm(x), None, sequence)[0]

    traced = _trace(build, run, width, batch, small)
    return dataclasses.replace(traced, exchanges=tuple(sequence.exchanges), windows=tuple(sequence.windows))


def _trace(
    build: Callable[[], nn.Module], run: Callable[[Any, Tensor], Tensor], width: int, batch: MicroBatch, small: float
) -> Traced:
    """`run(module, x)` and its backward pass, gradients of what `build` makes and of x `[rows,tokens,width]` included.

    `small`: bytes of the blocks that count as small.
    """
    tracer = Tracer(small)
    module = tracer.module(build)
    x = tracer.empty(batch.rows, batch.tokens, width, requires_grad=width > 0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=batch.dtype != torch.float32)
    with tracer:
        with tracer.record() as forward, autocast:
            out = run(module, x)
            # What only a cycle of objects still holds is not kept.
            gc.collect()
        d_out = torch.empty_like(out)
        with tracer.record() as backward:
            torch.autograd.backward(out, d_out)
    made = sum(weight.grad.nbytes for weight in module.parameters() if weight.grad is not None)
    return Traced(forward, backward, forward.flops, backward.flops, made)


def _lengths(
    build: Callable[[], nn.Module], trace: Callable[[MicroBatch, float], Traced], tokens: int, least: tuple[int, int]
) -> tuple[int, ...]:
    """Two lengths, from `least` on, at which the mixer does what it does at `tokens`, only less of it; or none."""
    if tokens <= least[1]:
        return ()
    low, high = least
    windows = trace(MicroBatch(1, 1, torch.float32, "auto"), 0).windows
    if windows:
        # Blocks that see the one before are there from two windows on, and make the peak from four; what is left of the
        # tokens is a block of its own.
        period = math.lcm(*windows)
        low = tokens % period + period * max(4, math.ceil(least[0] / period))
        high = low + period * math.ceil((least[1] - least[0]) / period)
    with torch.device("meta"):
        block = build()
    assert isinstance(block, Block), block
    first, second, flops = (block.mixer.flops(length) for length in (low, high, tokens))
    line = first + (second - first) * (tokens - low) / (high - low)
    return (low, high) if block.mixer.constant_state and abs(flops - line) <= 1e-6 * line else ()


def _at(batch: MicroBatch, trace: Callable[[MicroBatch, float], Traced], lengths: Sequence[int]) -> Traced:
    """`trace` of the batch, or for more tokens than the last of `lengths` what follows from its two."""
    if not lengths or batch.tokens <= lengths[1]:
        return trace(batch, SMALL)
    # Blocks that are small in the batch itself, not in the shorter one.
    low, high = (trace(dataclasses.replace(batch, tokens=length), SMALL * length / batch.tokens) for length in lengths)
    return _extended(low, high, (batch.tokens - lengths[0]) / (lengths[1] - lengths[0]))


def _extended(a: Any, b: Any, share: float) -> Any:
    """`a + share (b - a)` of all numbers inside that differ."""
    if isinstance(b, np.ndarray):
        # What is kept may be less than nothing: the backward pass frees more than it makes. Nothing else is.
        return a + share * (b - a)
    if isinstance(b, dict):
        return {name: _extended(a.get(name, Calls()), b.get(name, Calls()), share) for name in dict.fromkeys([*a, *b])}
    if isinstance(b, tuple):
        return tuple(_extended(first, second, share) for first, second in zip(a, b, strict=True))
    if isinstance(b, Traced | Recorded | Calls | Exchange):
        return type(b)(**{name: _extended(first, vars(b)[name], share) for name, first in vars(a).items()})
    return b if a == b else max(0.0, a + share * (b - a))
