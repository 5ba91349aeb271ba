"""An operator as one object: what it takes, keeps and costs is declared once, above its docstring.

From the declaration follow the checks of a call, its backends, what is sliced where a sequence is split in time, the
shapes of its state and output, its FLOPs, and its tests (`tests/kernels/test_contract.py`).
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper, wraps
from inspect import Parameter, Signature, signature
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from seqtrain.kernels import dispatch, outside
from seqtrain.kernels.checks import check_documents, check_kind, check_shape, check_state
from seqtrain.kernels.custom_ops import constant, opaque
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.segments import RELAYED, AffineScan, AffineSegment, Options, TimeSplit


class _Taken(threading.local):
    """On this thread, what is called in an operator's place: with it, and with its arguments."""

    function: Callable[..., Any] | None = None


_taken = _Taken()


@contextmanager
def taken_by(function: Callable[..., Any]) -> Iterator[None]:
    """Operators called in it, on this thread, are `function(operator, *args, **kwargs)`."""
    before, _taken.function = _taken.function, function
    try:
        yield
    finally:
        _taken.function = before


P = ParamSpec("P")
R = TypeVar("R")

# The sizes that the letters of shapes stand for.
Sizes = dict[str, int]
# An operator's tensors, in its order; None for those left out.
Inputs = Sequence[Any]
# Of a tensor: "..." in a shape stands for up to so many, with the letters d0, d1, ...
MOST_DIMENSIONS = 8
# Kinds of calls that an operator remembers to be in order.
MOST_CHECKED = 256


class Call(NamedTuple):
    """A checked call. `run`: the backend's function; `state`: the initial one, in the dtype states are carried in."""

    run: Callable
    state: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class operator:
    """Decorates the function of an operator, whose first parameters are its tensors, the others keywords.

    arguments: by name, the shapes a tensor may have, each of another number of dimensions. A shape is written in
        letters; T is the time axis, K+1 is one more than K, "..." any dimensions. Those with a default may be None.
    kinds: dtypes of tensors that are not floating, as `KINDS` calls them.
    out: the shape of the output. flops: multiply-adds times two of the forward pass, what the definition needs and not
        what a chunk form does on top; elementwise products are not counted.
    state: the shape of one row's or document's state, or a dict of them; None for an operator without one.
    state_from: whose dtypes decide the state's, the first tensor where empty; state_dtype: how.
    backends: modules of the operator's package with a function `run`, and "reference", which is a function beside the
        operator; none where there is one form only.
    time: how it is computed where a sequence is split in time.

    `flops` and `state` are called with the letters, `complex` (whether a tensor is) and the call's options as keywords.
    """

    arguments: Mapping[str, str | tuple[str, ...]]
    kinds: Mapping[str, str] = field(default_factory=dict)
    out: str
    flops: Callable[..., int]
    state: Callable[..., Any] | None = None
    state_from: tuple[str, ...] = ()
    state_dtype: Callable[..., torch.dtype] = state_dtype
    backends: tuple[str, ...] = ()
    time: TimeSplit = RELAYED

    def __call__(self, function: Callable[P, R]) -> "Operator[P, R]":
        return Operator(function, self)


class Operator(Generic[P, R]):
    """A pure function of tensors with a definition and faster backends; made by `operator`, which names its parts."""

    def __init__(self, function: Callable[P, R], declared: operator):
        update_wrapper(self, function)
        self.function, self.name = function, function.__name__
        self.kinds, self.backends, self.time = declared.kinds, declared.backends, declared.time
        self.arguments = {
            x: (shapes,) if isinstance(shapes, str) else shapes for x, shapes in declared.arguments.items()
        }
        parameters = signature(function).parameters
        self.optional = tuple(x for x in self.arguments if parameters[x].default is not Parameter.empty)
        self.declared = declared
        letters = {x: _by_dimensions(shapes) for x, shapes in self.arguments.items()}
        # What `check` knows of each argument, put together once: decoding calls operators on single tokens.
        self._checks = tuple(
            (f"{self.name}: {x}", x in self.optional, shapes, self.kinds.get(x, "a floating dtype"))
            for x, shapes in letters.items()
        )
        # What `check` has found in order.
        self._checked: dict[tuple, Sizes] = {}
        # Numbers of dimensions with which each argument has a time axis.
        self._timed = tuple(tuple(n for n, shape in each.items() if "T" in shape) for each in letters.values())
        # Not a dict, of which torch.compile would see only what was in it when it first looked.
        self._functions = SimpleNamespace()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and _taken.function is not None:
            found: R = _taken.function(self, *args, **kwargs)
            return found
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<operator {self.name}>"

    def __reduce__(self) -> str:
        return self.name

    def check(self, tensors: Sequence[Tensor | None]) -> Sizes:
        """The sizes of the letters; a letter takes its size where it first occurs and must agree everywhere else.

        `tensors`: in the order of `arguments`; optional ones may be missing at the end. Raises `ValueError` for a wrong
        shape, dtype or device, with the argument's name, what came and what was expected.
        """
        known = None if torch.compiler.is_compiling() else _kinds(tensors)
        if known is not None and known in self._checked:
            return self._checked[known]
        sizes: Sizes = {}
        device = _first(tensors).device
        for (name, optional, shapes, kind), tensor in zip(self._checks, tensors, strict=False):
            if tensor is None and optional:
                continue
            if tensor is None:
                raise ValueError(f"{name} is None, expected a tensor")
            check_shape(name, tensor, shapes, sizes)
            check_kind(name, tensor, kind)
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, expected {device}, where the first one is")
        if known is not None:
            if len(self._checked) == MOST_CHECKED:
                self._checked.clear()
            self._checked[known] = sizes
        return sizes

    def prepare(
        self,
        tensors: Sequence[Tensor | None],
        backend: str,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> Call:
        """Checks a call and gives what its backend is called with; `options`: those the state's shape depends on.

        `scale` is `K ** -0.5` where None. Raises `ValueError`.
        """
        sizes, first = self.check(tensors), _first(tensors)
        states = check_documents(self.name, cu_seqlens, sizes["B"], sizes["T"])
        shape = self._state_shape(states, sizes, options)
        check_state(self.name, initial_state, shape, first.device)
        dtype = self._state_dtype(tensors, initial_state)
        state = first.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        run = self.choose(backend, first.device, single_token=cu_seqlens is None and sizes["T"] == 1)
        return Call(run, state, sizes.get("K", 1) ** -0.5 if scale is None else scale)

    def choose(
        self, requested: str, device: torch.device, *, single_token: bool = False, function: str = "run"
    ) -> Callable:
        """The function `run`, or another `function`, of the backend that `requested` is on `device`.

        `single_token`: the call decodes one token a row, which is the function `step`. A request that can't run here is
        refused, whether or not it has the function: raises `ValueError` with the reason.
        """
        if not self.backends:
            return self.function
        return getattr(self._functions, self._found(requested, device.type, "step" if single_token else function))

    # torch.compile takes a name for a constant, but not a function.
    @constant
    def _found(self, requested: str, device_type: str, function: str) -> str:
        backend = dispatch.choose(self.name, self.__module__, self.backends, requested, device_type)
        key = f"{backend}_{function}"
        if not hasattr(self._functions, key):
            otherwise = "chunked"
            if backend in outside.NAMES:
                otherwise = dispatch.otherwise(self.name, self.__module__, self.backends, device_type)
            found = dispatch.function_of(self.__module__, backend, function, otherwise)
            setattr(self._functions, key, found)
        return key

    def backend(self, *, like: Callable[[Inputs, Tensor], Tensor]) -> Callable[[Callable], Callable]:
        """Decorates a backend's `run(inputs, state, cu_seqlens, *options)` -> `(out, final_state)`, as `opaque` does.

        inputs: the operator's tensors, all of them, as it normalises them. state: the initial one, given, in the dtype
        of states and sums. like: `(inputs, state)` -> what has the shape and dtype of `out`.
        """

        def decorate(run: Callable) -> Callable:
            def flat(*arguments: Any) -> tuple[Tensor, Tensor]:
                return run(arguments[:count], *arguments[count:])

            kind, count = Parameter.POSITIONAL_OR_KEYWORD, len(self.arguments)
            tensors = (Tensor | None if x in self.optional else Tensor for x in self.arguments)
            parameters = [Parameter(x, kind, annotation=of) for x, of in zip(self.arguments, tensors, strict=True)]
            parameters += list(signature(run).parameters.values())[1:]
            told = Signature(parameters, return_annotation=tuple[Tensor, Tensor])
            flat.__signature__ = told  # type: ignore[attr-defined]
            backend = "reference" if run.__name__ == "reference" else run.__module__.rpartition(".")[2]
            as_operator = opaque(f"{self.name}_{backend}", like=lambda *x: (like(x[:count], x[count]), x[count]))
            compiled: Any = as_operator(flat)

            @wraps(run)
            def call(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
                return compiled(*inputs, *others) if torch.compiler.is_compiling() else run(inputs, *others)

            call.operator = compiled.operator  # type: ignore[attr-defined]
            return call

        return decorate

    def along_time(self, tensors: Sequence[Any]) -> tuple[bool, ...]:
        """Which of the tensors have a time axis: it is their second one."""
        return tuple(x is not None and x.dim() in timed for x, timed in zip(tensors, self._timed, strict=False))

    def take(self, tensors: Sequence[Any], rows: slice) -> tuple[Any, ...]:
        """`tensors` at the tokens `rows`; those without a time axis as they are."""
        pairs = zip(tensors, self.along_time(tensors), strict=True)
        return tuple(x[:, rows] if timed else x for x, timed in pairs)

    def arranged(self, tensors: Sequence[Any], options: Options) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with all tensors by position, whichever came by name."""
        given = dict(zip(self.arguments, tensors, strict=False))
        given |= {name: options[name] for name in self.arguments if name in options}
        others = {name: value for name, value in options.items() if name not in given}
        return tuple(given.get(name) for name in self.arguments), others

    def state_shape(self, tensors: Sequence[Any], options: Options, states: int) -> Any:
        """`(shape, dtype)` of `states` states of a call; for a state that is a dict, a dict of them."""
        sizes, dtype = self.check(tensors), self._state_dtype(tensors, None)
        found = self._state_shape(states, sizes, options)
        if not isinstance(found, dict):
            return found, dtype
        return {key: (shape, torch.int64 if key == "length" else dtype) for key, shape in found.items()}

    def out_shape(self, tensors: Sequence[Any], options: Options) -> tuple[int, ...]:
        """The shape of the output of a call."""
        sizes = self.check(tensors)
        return _sized(self.declared.out.split(), sizes)

    def flops(self, tensors: Sequence[Any], options: Options) -> int:
        """Multiply-adds times two of the forward pass of a call, from its shapes alone."""
        is_complex = any(x is not None and x.is_complex() for x in tensors)
        return self.declared.flops(**self.check(tensors), complex=is_complex, **options)

    def segment(self, tensors: Sequence[Any], options: Options, backend: str) -> AffineSegment:
        """Tokens of one document (or of B rows) as an affine map; of an operator whose `time` is an `AffineScan`."""
        assert isinstance(self.time, AffineScan), self
        return self.time.segment(self, tensors, options, backend)

    def _state_shape(self, states: int, sizes: Sizes, options: Options) -> Any:
        assert self.declared.state is not None, self
        found = self.declared.state(**sizes, **options)
        if isinstance(found, dict):
            return {key: (states, *shape) for key, shape in found.items()}
        return (states, *found)

    def _state_dtype(self, tensors: Sequence[Any], initial_state: Any) -> torch.dtype:
        if not self.declared.state_from:
            return self.declared.state_dtype(_first(tensors).dtype)
        given = dict(zip(self.arguments, tensors, strict=False)) | {"initial_state": initial_state}
        counted = [given[name] for name in self.declared.state_from]
        return self.declared.state_dtype(*(x.dtype for x in counted if x is not None))


def _kinds(tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """All that `Operator.check` looks at; None of tensors that may have other than numbers as sizes."""
    found: list[Any] = []
    for x in tensors:
        if x is None:
            found.append(None)
        elif type(x) in (Tensor, nn.Parameter):
            found += (x.shape, x.dtype, x.device)
        else:
            return None
    return tuple(found)


def _first(tensors: Sequence[Any]) -> Tensor:
    first = tensors[0]
    assert isinstance(first, Tensor), first
    return first


def _by_dimensions(shapes: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """Letters by the number of dimensions."""
    found = {}
    for shape in shapes:
        letters = shape.split()
        for count in range(MOST_DIMENSIONS) if "..." in letters else (1,):
            rest = [f"d{index}" for index in range(count)]
            each = [x for letter in letters for x in (rest if letter == "..." else [letter])]
            found[len(each)] = tuple(each)
    return found


def rows_of(sizes: Mapping[str, int]) -> int:
    """How many there are of what the other letters tell: the dimensions that "..." stands for, together."""
    return math.prod(size for letter, size in sizes.items() if letter[0] == "d" and letter[1:].isdigit())


def _sized(letters: Sequence[str], sizes: Sizes) -> tuple[int, ...]:
    """The shape that letters stand for."""
    rest = [letter for letter in sizes if letter[0] == "d"]
    return tuple(sizes[x] for letter in letters for x in (rest if letter == "..." else [letter]))
