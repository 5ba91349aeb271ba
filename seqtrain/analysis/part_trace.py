"""Each kind of part of a model, run once on tensors that hold no numbers, forward and backward."""

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.analysis.trace import SIZES, Calls, Tracer, Work
from seqtrain.kernels.affine import AffineShape
from seqtrain.kernels.operator import Operator
from seqtrain.kernels.segments import AffineScan, PastInputs, Relayed
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.block import Block
from seqtrain.parallel.sequence import SequenceContext

# Longer sequences are not traced: two shorter ones are, of layers whose work grows in proportion to the tokens.
TRACED = (2048, 4096)
# Sequence on which the chunk form of an operator with a kernel of its own is traced, for its FLOPs.
CHUNKED = (512, 1024)
# Blocks below this size the C library's allocator keeps, larger ones it returns (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
SMALL = 32 * 2**20


@dataclass(frozen=True)
class Batch:
    """What runs through the model at once: `rows` sequences of `tokens`, products in `dtype`, operators' `backend`."""

    tokens: int
    rows: int
    dtype: torch.dtype
    backend: str


@dataclass(frozen=True)
class Exchange:
    """What an operator sends where a sequence is cut over ranks, one way: a scan of states of this `shape`, numbers of
    `item` bytes; or `near` bytes from the neighbour; or `spread` bytes, this rank's share of what all exchange.
    """

    shape: AffineShape | None = None
    item: int = 4
    near: float = 0.0
    spread: float = 0.0

    def of_rows(self, rows: int) -> "Exchange":
        """For so many rows beside each other."""
        shape = self.shape
        if shape is not None:
            more = "columns" if shape.identity else "rows"
            shape = dataclasses.replace(shape, **{more: getattr(shape, more) * rows})
        return Exchange(shape, self.item, self.near * rows, self.spread * rows)


@dataclass(frozen=True)
class Watched(SequenceContext):
    """A whole sequence that notes its operators' windows, and what they would exchange if it were cut."""

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
    # Queries, keys, values and outputs change from pieces of time to heads and back.
    return Exchange(spread=keys + 2 * first.nbytes)


@dataclass(frozen=True)
class Traced:
    """Forward and backward pass of a part, the FLOPs of its chunk forms, the bytes of gradients it makes, what it
    would exchange if the sequence were cut, and its operators' windows, in tokens.
    """

    forward: Work
    backward: Work
    executed_forward: float
    executed_backward: float
    gradient_bytes: int
    exchanges: tuple[Exchange, ...] = ()
    windows: tuple[int, ...] = ()


def trace_layer(model: ModelConfig, mixers: Mapping[str, Any], index: int, batch: Batch) -> tuple[Traced, Traced]:
    """The mixer of layer `index` with its norm and its sum with the residual stream, and the MLP with its own."""

    def build() -> nn.Module:
        return LanguageModel(dataclasses.replace(model, depth=index + 1), mixers, 1).blocks[index]

    mixer = _at(batch, partial(_trace_mixer, build, model.width), _lengths(build, model.width, batch.tokens, TRACED))
    if any(name.startswith("seqtrain.") for name in mixer.forward.calls):
        # A kernel of its own does what the chunk form does, unseen.
        chunked = dataclasses.replace(batch, backend="chunked")
        lengths = _lengths(build, model.width, batch.tokens, CHUNKED)
        chunks = _at(chunked, partial(_trace_mixer, build, model.width), lengths)
        mixer = dataclasses.replace(
            mixer, executed_forward=chunks.executed_forward, executed_backward=chunks.executed_backward
        )
    return mixer, _at(batch, partial(_trace_mlp, build, model.width), TRACED)


def trace_outside(model: ModelConfig, vocab_size: int, batch: Batch) -> tuple[Traced, Traced]:
    """The embedding, and the last norm with the head and the loss."""
    return (
        _at(batch, partial(_trace_embedding, vocab_size, model.width), TRACED),
        _at(batch, partial(_trace_loss, model, vocab_size), TRACED),
    )


def _trace_mixer(build: Callable[[], nn.Module], width: int, batch: Batch, small: float) -> Traced:
    tracer = Tracer(small)
    block = tracer.module(build)
    assert isinstance(block, Block), block
    sequence = Watched(backend=batch.backend)

    def run(x: Tensor) -> Tensor:
        mix = block._mix_groups if block.group else block._mix
        return x + mix(block.mixer_norm(x), None, sequence)[0]

    traced = _trace(tracer, run, block, width, batch)
    return dataclasses.replace(traced, exchanges=tuple(sequence.exchanges), windows=tuple(sequence.windows))


def _trace_mlp(build: Callable[[], nn.Module], width: int, batch: Batch, small: float) -> Traced:
    tracer = Tracer(small)
    block = tracer.module(build)
    assert isinstance(block, Block), block
    return _trace(tracer, lambda x: x + block.mlp(block.mlp_norm(x)), block, width, batch)


def _trace_embedding(vocab_size: int, width: int, batch: Batch, small: float) -> Traced:
    tracer = Tracer(small)
    embedding = tracer.module(lambda: nn.Embedding(vocab_size, width))
    return _trace(tracer, lambda _: embedding(_indices(batch)), embedding, 0, batch)


def _trace_loss(model: ModelConfig, vocab_size: int, batch: Batch, small: float) -> Traced:
    tracer = Tracer(small)
    # A model of the least layers, for its norm and head.
    one = dataclasses.replace(model, layers=("attention",), depth=1, width=model.width, groups=(0,))
    whole = tracer.module(lambda: LanguageModel(one, {"attention": MIXERS.get("attention").Config()}, vocab_size))
    ends = nn.ModuleList([whole.norm, whole.head])
    return _trace(tracer, lambda x: whole.head(whole.norm(x), _indices(batch)), ends, model.width, batch)


def _indices(batch: Batch) -> Tensor:
    return torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)


def _trace(tracer: Tracer, run: Callable[[Tensor], Tensor], module: nn.Module, width: int, batch: Batch) -> Traced:
    """`run(x)` and its backward pass, gradients of `module` and of x `[rows,tokens,width]` included."""
    x = tracer.empty(batch.rows, batch.tokens, width, requires_grad=width > 0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=batch.dtype != torch.float32)
    with tracer:
        with tracer.record() as forward, autocast:
            out = run(x)
            # What only a cycle of objects still holds is not kept.
            gc.collect()
        d_out = torch.empty_like(out)
        with tracer.record() as backward:
            torch.autograd.backward(out, d_out)
    made = sum(weight.grad.nbytes for weight in module.parameters() if weight.grad is not None)
    return Traced(forward, backward, forward.flops, backward.flops, made)


def _lengths(build: Callable[[], nn.Module], width: int, tokens: int, least: tuple[int, int]) -> tuple[int, ...]:
    """Two lengths, from `least` on, at which the mixer does what it does at `tokens`, only less of it; or none."""
    if tokens <= least[1]:
        return ()
    low, high = least
    windows = _trace_mixer(build, width, Batch(1, 1, torch.float32, "auto"), 0).windows
    if windows:
        # Blocks that see the one before are there from two windows on, and make the peak from four; what is left of the
        # tokens is a block of its own.
        period = math.lcm(*windows)
        low = tokens % period + period * max(4, math.ceil(least[0] / period))
        high = low + period * math.ceil((least[1] - least[0]) / period)
    with torch.device("meta"):
        block = build()
    assert isinstance(block, Block), block
    first, second = (block.mixer.flops(length) for length in (low, high))
    line = first + (second - first) * (tokens - low) / (high - low)
    linear = block.mixer.constant_state and abs(block.mixer.flops(tokens) - line) <= 1e-6 * line
    return (low, high) if linear else ()


def _at(batch: Batch, trace: Callable[[Batch, float], Traced], lengths: Sequence[int]) -> Traced:
    """`trace` of the batch, or for more tokens than the last of `lengths` what follows from its two."""
    if not lengths or batch.tokens <= lengths[1]:
        return trace(batch, SMALL)
    # Blocks that are small in the batch itself, not in the shorter one.
    low, high = (trace(dataclasses.replace(batch, tokens=length), SMALL * length / batch.tokens) for length in lengths)
    share = (batch.tokens - lengths[0]) / (lengths[1] - lengths[0])

    def line(first: float, second: float) -> float:
        return max(0.0, first + share * (second - first))

    def work(first: Work, second: Work) -> Work:
        names = dict.fromkeys([*first.calls, *second.calls])
        pairs = {name: (first.calls.get(name, Calls()), second.calls.get(name, Calls())) for name in names}
        calls = {
            name: Calls(line(a.count, b.count), line(a.flops, b.flops), line(a.bytes, b.bytes))
            for name, (a, b) in pairs.items()
        }
        # What is kept may be less than nothing: the backward pass frees more than it makes.
        a, b = ({name: getattr(each, name) for name in SIZES} for each in (first, second))
        return Work(calls, **{name: a[name] + share * (b[name] - a[name]) for name in SIZES})

    return Traced(
        work(low.forward, high.forward),
        work(low.backward, high.backward),
        line(low.executed_forward, high.executed_forward),
        line(low.executed_backward, high.executed_backward),
        high.gradient_bytes,
        tuple(
            dataclasses.replace(b, near=line(a.near, b.near), spread=line(a.spread, b.spread))
            for a, b in zip(low.exchanges, high.exchanges, strict=True)
        ),
    )
