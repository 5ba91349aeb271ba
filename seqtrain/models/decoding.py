"""Decoding on CPUs: the step of any model as one program of the native library, recorded when it is first taken.

The first step from a state runs as it always does, and is written down: what operators and PyTorch do, and where their
tensors lie (`seqtrain.kernels.native.recorder`). Later ones are one call of the library. States are what they are
without it: a step leaves the one it was given as it is. Memory of states that nobody holds any more is taken again, and
keys and values are added to where they lie.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqtrain.kernels.native.build import unavailable
from seqtrain.kernels.native.lowering import NoInstructionError
from seqtrain.kernels.native.program import Kept, Program
from seqtrain.kernels.native.recorder import Recorder, UnplannableError
from seqtrain.kernels.operator import Operator, taken_by
from seqtrain.mixers import State
from seqtrain.models.feed_forward import MoE
from seqtrain.models.quantized import integers_of, is_quantized
from seqtrain.models.spark import SparkMLP
from seqtrain.parallel.sequence import SequenceContext

log = logging.getLogger("seqtrain.models")

# Plans of one model, of which the oldest goes first: one for each number of rows.
MOST_PLANS = 4
# Rows that a buffer of keys has more than are needed, at least.
ROOM = 64

_plans: WeakKeyDictionary[nn.Module, dict[Any, "Plan | None"]] = WeakKeyDictionary()


def step(
    model: Any, tokens: Tensor, state: list[State], sequence: SequenceContext
) -> tuple[Tensor, list[State]] | None:
    """`LanguageModel.step` by a plan; None where there can be none."""
    if not _served(model, tokens, sequence):
        return None
    plans = _plans.setdefault(model, {})
    key = (len(tokens), torch.get_num_threads(), sequence.backend, sum(map(len, state)))
    if key in plans and (plan := plans[key]) is None:
        return None
    if key in plans and plan is not None and plan.accepts(model, state):
        return plan.run(tokens, state)
    while len(plans) >= MOST_PLANS:
        del plans[next(iter(plans))]
    try:
        plans[key], found = Plan.recorded(model, tokens, state, sequence)
    except UnplannableError as error:
        log.info("decoding: token by token in PyTorch: %s", error)
        plans[key] = None
        return None
    return found


def plans_of(model: Any) -> list["Plan | None"]:
    """Those that its steps have made, None where there could be none."""
    return list(_plans.get(model, {}).values())


def _served(model: Any, tokens: Tensor, sequence: SequenceContext) -> bool:
    """Whether a step may be a plan's: on a CPU, without gradients, a whole model."""
    weight = model.embedding.weight
    return (
        type(sequence) is SequenceContext
        and sequence.cu_seqlens is None
        and sequence.backend in ("auto", "native")
        and tokens.dim() == 1
        and len(tokens) > 0
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and model.tensor.count == 1
        and model.config.kind != "encoder"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
        and unavailable() is None
    )


class _Layer(dict[str, Tensor]):
    """A layer's state that a plan gave; a copy is a plain one. `rows`: the buffers that keys lie in, by their name."""

    plan: "Plan | None" = None
    rows: dict[str, "_Rows"]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _Rows:
    """Keys and values in buffers that have room for more. `end`: rows that are written."""

    def __init__(self, k: Tensor, v: Tensor, room: int):
        self.end = rows = k.shape[1]
        self.k, self.v = (x.new_empty(x.shape[0], rows + room, *x.shape[2:]) for x in (k, v))
        self.k[:, :rows], self.v[:, :rows] = k, v


@dataclass(frozen=True)
class _Keys:
    """Where in a state one attention's keys and values are. `grows`: whether rows are added, or the oldest one goes."""

    layer: int
    k: str
    v: str
    grows: bool

    def taken(self, state: Sequence[State]) -> tuple[_Rows, Kept]:
        """Those of a state, with room for one more row."""
        layer = state[self.layer]
        k, v, count = layer[self.k], layer[self.v], layer[self.k].shape[1]
        rows = layer.rows[self.k] if isinstance(layer, _Layer) else None
        start = 0 if rows is None else k.storage_offset() // (k.shape[2] * k.shape[3])
        # Another step may have gone on from the same state.
        if rows is None or rows.end != start + count or rows.end == rows.k.shape[1]:
            rows, start = _Rows(k, v, max(ROOM, count // 2)), 0
        return rows, Kept(rows.k, rows.v, start, count)

    def put(self, layer: _Layer, rows: _Rows, before: Kept) -> None:
        """Into the layer's state after it."""
        rows.end += 1
        first = before.start if self.grows else before.start + 1
        layer[self.k], layer[self.v] = rows.k[:, first : rows.end], rows.v[:, first : rows.end]
        layer.rows[self.k] = rows


class _Memory:
    """States and logits of one step, as parts of a tensor for each dtype."""

    def __init__(self, sizes: Mapping[torch.dtype, int]):
        self.flat = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        self._storages = [x.untyped_storage() for x in self.flat.values()]
        self._alone = self._holders()

    @property
    def free(self) -> bool:
        """Whether nobody holds any tensor of it."""
        return self._holders() == self._alone

    def _holders(self) -> list[int]:
        return [torch._C._storage_Use_Count(x._cdata) for x in self._storages]


class Plan:
    """The step of a model for so many rows."""

    def __init__(self, program: Program, trace: "_Trace", model: Any, names: Sequence[tuple[int, str]]):
        self.program, self._keys, self._print = program, trace.keys, _fingerprint(model)
        self._given = trace.names
        self._shapes = trace.shapes
        self._names = names
        self._layers = len(model.blocks)
        sizes: dict[torch.dtype, int] = {}
        self._places: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]] = []
        for x in trace.outs:
            first = -(-sizes.get(x.dtype, 0) // 16) * 16
            strides = torch.empty(x.shape, device="meta").stride()
            self._places.append((x.dtype, tuple(x.shape), tuple(strides), first))
            sizes[x.dtype] = first + x.numel()
        self._sizes, self._memories = sizes, list[_Memory]()

    @classmethod
    def recorded(
        cls, model: Any, tokens: Tensor, state: list[State], sequence: SequenceContext
    ) -> tuple["Plan", tuple[Tensor, list[State]]]:
        """The plan, and what the step that it was recorded from gives. Raises `UnplannableError`."""
        tokens, state = _own(tokens), [{name: _own(x) for name, x in layer.items()} for layer in state]
        trace = _Trace(tokens, state)
        with trace.recorder, taken_by(trace.operator), _Linears(trace), _opaque(model, trace):
            logits, after = model(tokens, state=state, sequence=Stepped(backend=sequence.backend))
        names = [
            (layer, name)
            for layer, each in enumerate(after)
            for name, x in each.items()
            if not any(x is kept for kept in trace.kept)
        ]
        if {(layer, name) for layer, each in enumerate(after) for name in each} != set(trace.names):
            raise UnplannableError("the state has other parts than the one before it")
        trace.outs = [logits, *(after[layer][name] for layer, name in names)]
        views = [trace.recorder.view(x) for x in trace.outs]
        try:
            program = Program(trace.recorder, views, kept=len(trace.keys), threads=torch.get_num_threads())
        except NoInstructionError as error:
            raise UnplannableError(f"the library's {error} is for float32, float64 and bfloat16") from error
        plan = cls(program, trace, model, names)
        others = ", ".join(f"{count} {name}" for name, count in program.why.items())
        log.info("decoding: %d instructions%s", program.instructions, f"; by PyTorch: {others}" if others else "")
        return plan, (logits, after)

    def accepts(self, model: Any, state: Sequence[State]) -> bool:
        """Whether it can go on from this state. One that it did not give is looked at, and so are the weights."""
        first = state[0] if state else {}
        if isinstance(first, _Layer) and first.plan is self:
            return True
        for (layer, name), shape, dtype in self._shapes:
            x = state[layer].get(name)
            if x is None or tuple(x.shape) != shape or x.dtype != dtype:
                return False
        if self._print != _fingerprint(model):
            return False
        self.program.begin()
        return True

    def run(self, tokens: Tensor, state: Sequence[State]) -> tuple[Tensor, list[State]]:
        """`([B,vocab], state)`."""
        given = [tokens, *(state[layer][name] for layer, name in self._given)]
        kept = [each.taken(state) for each in self._keys]
        memory = next((each for each in self._memories if each.free), None)
        if memory is None:
            # Two take turns; more are for those who keep states.
            self._memories = [*self._memories[-1:], memory := _Memory(self._sizes)]
        outs = [memory.flat[dtype].as_strided(shape, strides, first) for dtype, shape, strides, first in self._places]
        self.program.run(given, [each for _, each in kept], outs)
        after = [_Layer() for _ in range(self._layers)]
        for layer_state in after:
            layer_state.plan, layer_state.rows = self, {}
        for (layer, name), x in zip(self._names, outs[1:], strict=True):
            after[layer][name] = x
        for each, (rows, before) in zip(self._keys, kept, strict=True):
            each.put(after[each.layer], rows, before)
        return outs[0], list[State](after)


def _own(x: Tensor) -> Tensor:
    """`x`, contiguous and with all of its storage."""
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)


def _fingerprint(model: nn.Module) -> int:
    """What a plan depends on besides states: where weights lie, and how modules are set."""
    simple = (bool, int, float, str, tuple, torch.dtype, type(None))
    weights = (*model.parameters(), *model.buffers())
    parts: list[Any] = [(x.qdata if is_quantized(x) else x).data_ptr() for x in weights]  # type: ignore[attr-defined]
    for module in model.modules():
        parts.append(type(module))
        parts += [(name, x) for name, x in module.__dict__.items() if isinstance(x, simple) and name != "training"]
        parts += [id(x) for x in module._modules.values()]
        parts += [id(x) for x in module._forward_pre_hooks.values()] + [id(x) for x in module._forward_hooks.values()]
    return hash(repr(parts))


class _Trace:
    """What is known of a step while it is written down."""

    def __init__(self, tokens: Tensor, state: Sequence[State]):
        # Of the state's parts, in the order in which a program is given them.
        self.names = [(layer, name) for layer, each in enumerate(state) for name in each]
        tensors = [state[layer][name] for layer, name in self.names]
        self.recorder = Recorder([tokens, *tensors])
        self._of = {id(x): name for x, name in zip(tensors, self.names, strict=True)}
        self._state = tensors
        self.keys: list[_Keys] = []
        self.kept: list[Tensor] = []
        self.outs: list[Tensor] = []

    @property
    def shapes(self) -> list[tuple[tuple[int, str], tuple[int, ...], torch.dtype]]:
        """Of what must be as it was; keys and values may be more."""
        grown = {(each.layer, name) for each in self.keys for name in (each.k, each.v) if each.grows}
        pairs = zip(self.names, self._state, strict=True)
        return [(name, tuple(x.shape), x.dtype) for name, x in pairs if name not in grown]

    def operator(self, operator: Operator, *args: Any, **kwargs: Any) -> Any:
        """What is called in an operator's place."""
        if self.recorder.paused:
            return operator.function(*args, **kwargs)
        own = OPERATORS.get(operator.name)
        if own is not None and (found := own(self, operator.function, _given(operator, args, kwargs))) is not None:
            return found
        if operator.backends:
            kwargs["backend"] = "chunked"
        return operator.function(*args, **kwargs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        integers = is_quantized(weight)
        if self.recorder.paused or not (integers or weight.is_contiguous()) or x.dtype != weight.dtype:
            return F.linear(x, weight, bias)
        with self.recorder.unseen():
            out = F.linear(x, weight, bias)
            numbers, scale, options = integers_of(weight) if integers else (weight, None, {})
        if out.numel():
            self.recorder.special("linear", [x, numbers, bias, scale], [out], **options)
        return out


def _given(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, defaults and all, but for the backend and documents; there are none."""
    own = signature(operator.function)
    bound = own.bind(*args, **{name: value for name, value in kwargs.items() if name in own.parameters})
    bound.apply_defaults()
    return {name: value for name, value in (bound.arguments | kwargs).items() if name not in ("backend", "cu_seqlens")}


class _Linears(TorchFunctionMode):
    """Writes down a product with a matrix of weights as one; `one_hot` looks at its numbers, and here does not."""

    def __init__(self, trace: _Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        call = {F.linear: self.trace.linear, F.one_hot: _one_hot}.get(func, func)
        return call(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int) -> Tensor:
    return (index[..., None] == torch.arange(num_classes)).to(torch.int64)


@contextmanager
def _opaque(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Which experts or channels work is decided by numbers: what chooses them is called as it is."""
    choosing = [module for module in model.modules() if isinstance(module, MoE | SparkMLP)]

    def taken(module: MoE | SparkMLP) -> Callable[[Tensor], Tensor]:
        forward = module.forward

        def call(x: Tensor) -> Tensor:
            with trace.recorder.unseen():
                out = forward(x)
            trace.recorder.opaque(forward, [x], [out])
            return out

        return call

    for module in choosing:
        module.forward = taken(module)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for module in choosing:
            del module.forward


@dataclass(frozen=True)
class Stepped(SequenceContext):
    """One token of each row, written down."""

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> "SequenceContext":
        return SteppedGroups(backend=self.backend, size=size, past=past, shift=shift)


@dataclass(frozen=True, kw_only=True)
class SteppedGroups(Stepped):
    """One token of each row, whose groups know nothing of each other: see `SequenceContext.grouped`."""

    size: int
    past: Tensor | None
    shift: int = 0
    # Tokens of a row, where each stands more than once.
    times: int = 1

    def _run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        if self.past is None or initial_state is None:
            raise UnplannableError("groups of tokens begin with the first one")
        whole = (self.past + (self.shift + self.times)) % self.size == 0
        extra = {"rows": self.size - 1} if operator.name == "softmax_attention" else {}
        out, after = operator(*tensors, initial_state=initial_state, backend=self.backend, **options, **extra)

        def ended(x: Tensor) -> Tensor:
            return x.masked_fill(whole.view(-1, *(1,) * (x.dim() - 1)), 0)

        if operator.name == "softmax_attention":
            return out, after | {"length": ended(after["length"])}
        return out, {name: ended(x) for name, x in after.items()} if isinstance(after, dict) else ended(after)

    def repeated(self, times: int) -> SequenceContext:
        past = None if self.past is None else times * self.past
        return replace(self, past=past, size=times * self.size, shift=times * self.shift, times=times * self.times)

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> SequenceContext:
        raise UnplannableError("groups within groups")


# Arguments of an operator's call by their names, those left out with their defaults.
Given = Mapping[str, Any]


def _recurrence(trace: _Trace, function: Callable[..., Any], given: Given) -> Any:
    """The delta rule or linear attention, token by token; None where it can't be."""
    recorder, state = trace.recorder, given["initial_state"]
    if state is None or state.dtype not in (torch.float32, torch.float64) or not state.is_contiguous():
        return None
    q, log_decay = given["q"], given["log_decay"]
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.to(state.dtype).expand(q.shape[:3])
    inputs = (q, given["k"], given["v"], given.get("beta"), log_decay, given.get("read"), given.get("erase"))
    with recorder.unseen():
        out, after = function(**given)
        out, after = out.contiguous(), after.contiguous()
        tokens = [([None if x is None else x[:, t] for x in inputs], out[:, t]) for t in range(q.shape[1])]
    scale = q.shape[3] ** -0.5 if given["scale"] is None else given["scale"]
    for token, read in tokens:
        recorder.special("recurrence", [*token, state], [read, after], scale=scale)
        state = after
    return out, after


def _short_convolution(trace: _Trace, function: Callable[..., Any], given: Given) -> Any:
    x, past, dilation = given["x"], given["initial_state"], given["dilation"]
    if past is None or x.shape[1] != 1 or not past.is_contiguous() or not past.numel():
        return None
    with trace.recorder.unseen():
        out, after = function(**given)
        after = after.contiguous()
        token, read = x[:, 0], out[:, 0]
    inputs = [token, given["weight"], given["bias"], past]
    silu = given["activation"] == "silu"
    trace.recorder.special("convolution", inputs, [read, after], dilation=dilation, silu=silu)
    return out, after


def _gated_norm(trace: _Trace, function: Callable[..., Any], given: Given) -> Any:
    with trace.recorder.unseen():
        out = function(**given)
    options = {"silu": int(given["activation"] == "silu"), "gate_first": int(given["gate_first"])}
    inputs = [given[name] for name in ("x", "weight", "gate")]
    trace.recorder.special("gated_norm", inputs, [out], eps=given["eps"], **options)
    return out


def _softmax_attention(trace: _Trace, function: Callable[..., Any], given: Given) -> Any:
    """`rows`, where groups say so: of keys that are kept."""
    q, k, v, window, initial_state = (given[name] for name in ("q", "k", "v", "window", "initial_state"))
    rows, scale = given.get("rows"), given["scale"]
    names = [] if initial_state is None else [trace._of.get(id(initial_state[each])) for each in ("k", "v")]
    if initial_state is None or q.shape[1] != 1 or None in names:
        raise UnplannableError("attention to keys that are no part of the state")
    if given["kept_keys"] and window is None and rows is None:
        raise UnplannableError("attention to keys that are chosen by their scores")
    past_k, past_v, length = (initial_state[each] for each in ("k", "v", "length"))
    if len({x.dtype for x in (q, k, v, past_k, past_v)}) > 1:
        raise UnplannableError("attention to keys of another dtype")
    recorder, number = trace.recorder, len(trace.keys)
    grows = window is None and rows is None
    with recorder.unseen():
        options = {name: given[name] for name in ("window", "scale", "score_cap", "initial_state")}
        out, after = function(q, k, v, **options, backend="chunked")
        out = out.contiguous()
        if not grows:
            held = rows if window is None or rows is not None else window - 1
            first = 1 if past_k.shape[1] == held else 0
            joined = [torch.cat(pair, 1)[:, first:] for pair in ((past_k, k), (past_v, v))]
            after = after | dict(zip("kv", joined, strict=True))
            if first == 0:
                raise UnplannableError("a window of another length than the state's")
        tokens = [x[:, 0] for x in (out, q, k, v)]
    most = past_k.shape[1]
    counted = length if window is None or rows is None else length.clamp(max=window - 1)
    after["length"] = length + 1 if grows else (length + 1).clamp(max=most)
    (layer, name_k), (_, name_v) = names  # type: ignore[misc]
    trace.keys.append(_Keys(layer, name_k, name_v, grows))
    trace.kept += [after["k"], after["v"]]
    for n, x in enumerate((past_k, past_v)):
        recorder.keep(x, 2 * number + n)
    recorder.special(
        "attention",
        [*tokens[1:], past_k, past_v, counted],
        tokens[:1],
        kept=number,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        cap=given["score_cap"],
    )
    return out, after


OPERATORS: dict[str, Callable[[_Trace, Callable[..., Any], Given], Any]] = {
    "delta_rule": _recurrence,
    "linear_attention": _recurrence,
    "short_convolution": _short_convolution,
    "gated_norm": _gated_norm,
    "softmax_attention": _softmax_attention,
}
