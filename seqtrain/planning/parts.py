"""Each kind of part of a model, traced once on tensors without values, forward and backward."""

import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.kernels.affine import AffineShape
from seqtrain.kernels.operator import Operator
from seqtrain.kernels.segments import AffineScan, PastInputs, PastKeys, PastKeysAndSinks, Relayed
from seqtrain.models import LanguageModel
from seqtrain.parallel.attention_layout import Heads
from seqtrain.parallel.both_ways import BothWays
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.planning.trace import Calls, Recorded, Tracer, scaled

# Long sequences are not traced: two shorter ones are, of layers whose work grows in proportion to the tokens. The first
# has as many tokens as make about so many numbers of the residual stream, more than operators work on at once
# (`kernels.chunk_form.SEGMENT_NUMBERS`), within these limits.
NUMBERS, LEAST, MOST = 2**19, 256, 2048
# Sequence on which the chunk form of an operator with a kernel of its own is traced, for its FLOPs.
CHUNKED = 128


@dataclass(frozen=True)
class MicroBatch:
    """What runs through the model at once: `rows` sequences of `tokens`, products in `dtype`, operators' `backend`,
    and that of softmax attention where it is another.
    """

    tokens: int
    rows: int
    dtype: torch.dtype
    backend: str
    softmax: str = ""


@dataclass(frozen=True)
class Exchange:
    """What an operator sends one way where the sequence is sharded over ranks: a scan of states of this `shape` in
    numbers of `item` bytes; or `near` bytes from the neighbor; or what softmax attention of these `heads` moves for
    `tokens` of this rank.
    """

    shape: AffineShape | None = None
    item: int = 4
    near: float = 0.0
    heads: Heads | None = None
    tokens: float = 0
    rows: int = 1

    def of_rows(self, rows: int) -> "Exchange":
        """For so many rows at once."""
        shape = self.shape
        if shape is not None:
            more = "columns" if shape.identity else "rows"
            shape = dataclasses.replace(shape, **{more: getattr(shape, more) * rows})
        return dataclasses.replace(self, shape=shape, near=self.near * rows, rows=self.rows * rows)


# The name of a layer's mixer, the tokens of its groups and their shift, whether it has a shared block.
Kind = tuple[str, int, int, bool]


@dataclass(frozen=True)
class RecordingContext(SequenceContext):
    """A whole sequence that notes its operators' windows, and what they would exchange if it were sharded."""

    exchanges: list[Exchange] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    softmax: str = ""

    def run(self, operator: Any, *tensors: Any, initial_state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        self.exchanges.append(_exchange(operator, tensors, options))
        window = options.get("window")
        if window is not None:
            self.windows.append(window)
        backend = self.backend
        if isinstance(operator.time, PastInputs) and backend == "chunked":
            # It has no products of matrices, whose FLOPs the chunk forms are traced for.
            backend = "auto"
        elif isinstance(operator.time, PastKeys | PastKeysAndSinks):
            backend = self.softmax or backend
        here = dataclasses.replace(self, backend=backend)
        return SequenceContext.run(here, operator, *tensors, initial_state=initial_state, **options)


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
    heads = Heads(first.shape[2], tensors[1].shape[2], first.shape[3], tensors[2].shape[3], first.dtype.itemsize)
    return Exchange(heads=heads, tokens=first.shape[1], rows=first.shape[0])


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


class PartTracer:
    """Traces the parts of a model on `meta`, each kind once at each length."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.width = model, model.config.width
        blocks = list(reversed(list(enumerate(model.blocks))))
        self.mixers = {self.kind(index): block for index, block in blocks if block.mixer is not None}
        self.mlps = {model.config.mlp(index): block for index, block in blocks if block.mlp is not None}
        # Methods of one object alone, so that what is traced goes with it.
        self._cached_mixer, self._cached_mlp, self._cached_loss = (
            cache(self._mixer),
            cache(self._mlp),
            cache(self._loss),
        )

    def kind(self, index: int) -> Kind:
        """What makes a layer's mixer do the same as another's: its name, its groups, a shared block."""
        block = self.model.blocks[index]
        return self.model.config.mixer(index), block.group, block.shift, block.shared is not None

    def mixer(self, kind: Kind, batch: MicroBatch) -> Traced:
        """A layer's mixer with its norm and its sum with the residual stream."""
        trace = partial(self._cached_mixer, kind)
        mixer = _at(batch, trace, self._lengths(kind, batch, self._short(batch)))
        if not any(name.startswith("seqtrain.") for name in mixer.forward.calls):
            return mixer
        # A kernel of its own does what the chunk form does, unseen; of each row as much. What recurrences do is in
        # proportion to the tokens, all else is seen where softmax attention has its PyTorch form.
        seen = dataclasses.replace(batch, softmax="chunked")
        hidden = any(name.startswith("seqtrain.") and "softmax" in name for name in mixer.forward.calls)
        whole = _at(seen, trace, self._lengths(kind, seen, self._short(batch))) if hidden else mixer
        lengths = _doubled(CHUNKED) if batch.tokens > 2 * CHUNKED else (batch.tokens,)
        executed = {}
        for name in ("executed_forward", "executed_backward"):
            unseen = []
            for length in lengths:
                row = dataclasses.replace(seen, tokens=length, rows=1)
                chunks = trace(dataclasses.replace(row, backend="chunked"))
                unseen.append(getattr(chunks, name) - getattr(trace(row), name))
            more = (batch.tokens - lengths[-1]) / CHUNKED * (unseen[-1] - unseen[0])
            executed[name] = getattr(whole, name) + batch.rows * (unseen[-1] + more)
        return dataclasses.replace(mixer, **executed)

    def mlp(self, kind: str, batch: MicroBatch) -> Traced:
        """A layer's MLP, or its experts, with its norm and its sum."""
        return _at(batch, partial(self._cached_mlp, kind), _doubled(self._short(batch)))

    def loss(self, batch: MicroBatch) -> Traced:
        """The last norm with the head and the loss."""
        # Its temporaries are those of a chunk of tokens.
        return _at(batch, self._cached_loss, _doubled(max(self._short(batch), 2 * self.model.config.loss_chunk)))

    def embedding(self, batch: MicroBatch) -> Traced:
        return _trace(self.model.embedding, lambda table, x: table(_indices(x)), 0, batch)

    def _mixer(self, kind: Kind, batch: MicroBatch) -> Traced:
        sequence = RecordingContext(backend=batch.backend, softmax=batch.softmax)
        noted: dict[str, Any] = {}
        encoder = self.model.config.kind == "encoder"

        def run(block: Any, x: Tensor) -> Tensor:
            out: Tensor = block.mix(x, None, BothWays.of(sequence) if encoder else sequence)[0]
            # As they are now: what is computed again sends nothing.
            noted.update(exchanges=tuple(sequence.exchanges), windows=tuple(sequence.windows))
            return out

        traced = _trace(self.mixers[kind], run, self.width, batch)
        return dataclasses.replace(traced, **noted)

    def _mlp(self, kind: str, batch: MicroBatch) -> Traced:
        return _trace(self.mlps[kind], lambda block, x: block.feed(x), self.width, batch)

    def _loss(self, batch: MicroBatch) -> Traced:
        last = nn.ModuleList([self.model.norm, self.model.head])
        return _trace(last, lambda last, x: last[1](last[0](x), _indices(x)), self.width, batch)

    def _short(self, batch: MicroBatch) -> int:
        """Tokens of the first of the two sequences that are traced instead of a long one."""
        return min(MOST, max(LEAST, 2 ** round(math.log2(NUMBERS / batch.rows / self.width))))

    def _lengths(self, kind: Kind, batch: MicroBatch, least: int) -> tuple[int, ...]:
        """Two lengths, from `least` on, at which the mixer does what it does for the batch, but less of it; or none."""
        low, high = _doubled(least)
        if batch.tokens <= high:
            return ()
        windows = self._cached_mixer(kind, MicroBatch(1, 1, torch.float32, "auto")).windows
        if windows:
            # Blocks that see the one before are there from two windows on, and make the peak from four; what is left of
            # the tokens is a block of its own.
            period = math.lcm(*windows)
            low = batch.tokens % period + period * max(4, math.ceil(least / period))
            high = low + period * math.ceil(least / period)
        mixer = self.mixers[kind].mixer
        first, second, flops = (mixer.flops(length) for length in (low, high, batch.tokens))
        line = first + (second - first) * (batch.tokens - low) / (high - low)
        constant = mixer.constant_state and self.mixers[kind].shared is None
        return (low, high) if constant and abs(flops - line) <= 1e-6 * line else ()


def _doubled(length: int) -> tuple[int, int]:
    return length, 2 * length


def _indices(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:2], dtype=torch.int64)


def _trace(on_meta: nn.Module, run: Callable[[Any, Tensor], Tensor], width: int, batch: MicroBatch) -> Traced:
    """`run(module, x)` and its backward pass, gradients of the module and of x `[rows,tokens,width]` included."""
    tracer = Tracer()
    x = tracer.empty(batch.rows, batch.tokens, width, requires_grad=width > 0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=batch.dtype != torch.float32)
    # What is there already is not looked through each time.
    gc.freeze()
    with tracer.filled(on_meta) as module:
        with tracer:
            with tracer.record() as forward, autocast:
                out = run(module, x)
                # What only a cycle of objects still holds is not kept.
                gc.collect()
            d_out = torch.empty_like(out)
            with tracer.record() as backward:
                # An embedding that is not trained has no backward pass.
                if out.requires_grad:
                    torch.autograd.backward(out, d_out)
        made = sum(weight.grad.nbytes for weight in module.parameters() if weight.grad is not None)
    gc.unfreeze()
    return Traced(forward, backward, forward.flops, backward.flops, made)


def _at(batch: MicroBatch, trace: Callable[[MicroBatch], Traced], lengths: tuple[int, ...]) -> Traced:
    """`trace` of the batch, or for more tokens than the last of `lengths` what follows from its two."""
    if not lengths or batch.tokens <= lengths[1]:
        return trace(batch)
    low, high = (trace(dataclasses.replace(batch, tokens=length)) for length in lengths)
    factor = batch.tokens / lengths[1]
    extended: Traced = _extended(low, high, (batch.tokens - lengths[0]) / (lengths[1] - lengths[0]))
    for ours, theirs in ((extended.forward, high.forward), (extended.backward, high.backward)):
        ours.made = scaled(theirs.made, factor)
    return extended


def _extended(a: Any, b: Any, share: float) -> Any:
    """`a + share (b - a)` of all numbers inside that differ."""
    if isinstance(b, Counter):
        return b
    if isinstance(b, dict):
        return {name: _extended(a.get(name, Calls()), b.get(name, Calls()), share) for name in dict.fromkeys([*a, *b])}
    if isinstance(b, tuple):
        return tuple(_extended(first, second, share) for first, second in zip(a, b, strict=True))
    if isinstance(b, Traced | Recorded | Calls | Exchange):
        return type(b)(**{name: _extended(first, vars(b)[name], share) for name, first in vars(a).items()})
    if a == b:
        return b
    line = a + share * (b - a)
    # Less than nothing is what a backward pass keeps, which frees more than it makes.
    return line if min(a, b) < 0 else max(0.0, line)
