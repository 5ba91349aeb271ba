"""What a function of tensors does, written down while it runs: the operations, and where their tensors lie.

Views are not operations: a tensor is a place in a storage, with sizes and strides. What depends on nothing that is
given or learned is kept as it came out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten


class UnplannableError(RuntimeError):
    """What a function does depends on numbers in its tensors, or is done where it can't be seen."""


class Level(IntEnum):
    """What a storage's numbers follow from: nothing, weights alone, or what a call is given."""

    FIXED = 0
    LEARNED = 1
    GIVEN = 2


@dataclass(eq=False)
class Storage:
    """Memory that tensors lie in. `tensor`: one that spans it, of those from outside; None: made by the function.

    `given`: its number among what a call is given, -1 for none. `kept`: its number among keys and values that grow.
    """

    nbytes: int
    level: Level
    tensor: Tensor | None = None
    given: int = -1
    kept: int = -1
    origin: str = ""

    @property
    def made(self) -> bool:
        return self.tensor is None and self.given < 0 and self.kept < 0


@dataclass(frozen=True)
class View:
    """A tensor's place. `offset`: bytes; `strides`: numbers; `conjugated`, `negated`: lazily."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    conjugated: bool = False
    negated: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def with_dims(self, dims: Sequence[tuple[int, int]], offset: int = 0) -> "View":
        """Of other sizes and strides, from `offset` numbers further on."""
        sizes, strides = tuple(size for size, _ in dims), tuple(stride for _, stride in dims)
        first = self.offset + offset * self.dtype.itemsize
        return View(self.storage, self.dtype, sizes, strides, first, self.conjugated, self.negated)

    @property
    def dims(self) -> list[tuple[int, int]]:
        return list(zip(self.shape, self.strides, strict=True))

    def narrowed(self, dim: int, start: int, length: int) -> "View":
        dims = self.dims
        offset = start * dims[dim][1]
        dims[dim] = (length, dims[dim][1])
        return self.with_dims(dims, offset)

    def expanded(self, shape: Sequence[int]) -> "View":
        """Broadcast to `shape`."""
        dims = [(1, 0)] * (len(shape) - len(self.shape)) + self.dims
        pairs = zip(dims, shape, strict=True)
        return self.with_dims([(want, 0 if size == 1 and want != 1 else stride) for (size, stride), want in pairs])

    def permuted(self, order: Sequence[int]) -> "View":
        dims = self.dims
        return self.with_dims([dims[n] for n in order])

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in reversed(self.dims):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return not self.conjugated and not self.negated


@dataclass
class Call:
    """An operation. `function`: PyTorch's, or one that is called as it is; `args`, `kwargs`: with views for tensors.

    `special`: the name of an operation of the library's own, whose views are `args` and numbers `options`.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[View]
    options: dict[str, Any] = field(default_factory=dict)
    special: bool = False

    @property
    def inputs(self) -> list[View]:
        return [x for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, View)]


# What is read from a tensor decides what is done next.
READ = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique_consecutive", "_unique2", "masked_select")
# Numbers that do not follow from those of the tensor whose shape or dtype they have.
FACTORIES = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
RANDOM = ("multinomial", "bernoulli", "rand", "randn", "randint", "normal", "uniform", "native_dropout")


class Recorder(TorchDispatchMode):
    """A mode under which a function runs once. `given`: what a call is given, by number."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.calls: list[Call] = []
        self.paused = False
        # Tensors live as long as this, so that no storage's address is another's.
        self._alive: list[Any] = []
        self._storages: dict[int, Storage] = {}
        for number, tensor in enumerate(given):
            self._new(tensor, Level.GIVEN, given=number)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Nothing is written down in it."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def view(self, x: Tensor) -> View:
        """Where `x` lies; one that was never seen came from outside."""
        found = self._known(x) or self._new(x, Level.LEARNED, outside=True)
        shape, strides = tuple(x.shape), tuple(x.stride())
        return View(found, x.dtype, shape, strides, int(x.storage_offset()) * x.itemsize, x.is_conj(), x.is_neg())

    def special(self, name: str, inputs: Sequence[Tensor | None], outs: Sequence[Tensor], **options: Any) -> None:
        """Writes down an operation of the library's own, which made `outs`."""
        views = tuple(None if x is None else self.view(x) for x in inputs)
        self._add(Call(name, None, views, {}, [], options, special=True), outs)

    def opaque(self, function: Callable[..., Any], inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Writes down a call that is to be made as it is."""
        self._add(Call(getattr(function, "__name__", "call"), function, tuple(map(self.view, inputs)), {}, []), outs)

    def keep(self, x: Tensor, number: int) -> Storage:
        """Says that `x` is number `number` of the keys and values that grow: nothing else may read it."""
        storage = self._known(x) or self._new(x, Level.GIVEN)
        storage.kept, storage.given, storage.tensor, storage.level = number, -1, None, Level.GIVEN
        return storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        views = [self.view(x) for x in inputs] if name != "lift_fresh" else []
        level = max((view.storage.level for view in views), default=Level.FIXED)
        if name.startswith(RANDOM) or (name in READ and level > Level.FIXED):
            raise UnplannableError(f"{name} of what a call is given")
        written = self._written(func, args, kwargs)
        for x in written:
            self._before_writing(x, level)
        out = func(*args, **kwargs)
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self._alive.append((inputs, outs))
        if name == "lift_fresh" or level == Level.FIXED or name in FACTORIES:
            self._take_as_they_are(outs, name)
        elif written or any(self._known(x) is None for x in outs):
            seen, named = tree_map(lambda x: self.view(x) if isinstance(x, Tensor) else x, (args, kwargs))
            self._add(Call(name, func, seen, named, []), written or outs)
        return out

    def _add(self, call: Call, outs: Sequence[Tensor]) -> None:
        level = max((view.storage.level for view in call.inputs), default=Level.LEARNED)
        for x in outs:
            known = self._known(x)
            if known is None:
                known = self._new(x, level, origin=call.name)
            known.level = max(level, known.level)
        call.outs = [self.view(x) for x in outs]
        self.calls.append(call)

    def _take_as_they_are(self, outs: Sequence[Tensor], name: str) -> None:
        for x in outs:
            if self._known(x) is None:
                self._new(x, Level.FIXED, outside=True, origin=name)

    def _known(self, x: Tensor) -> Storage | None:
        return self._storages.get(x.untyped_storage()._cdata)

    def _new(self, x: Tensor, level: Level, *, given: int = -1, outside: bool = False, origin: str = "") -> Storage:
        whole = x.untyped_storage()
        found = Storage(whole.nbytes(), level, x if outside else None, given, origin=origin)
        self._alive.append(x)
        self._storages[whole._cdata] = found
        return found

    def _written(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that the operation changes."""
        found = []
        for n, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[n] if n < len(args) else kwargs.get(argument.name)
            found += [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]
        return found

    def _before_writing(self, x: Tensor, level: Level) -> None:
        """What was kept as it is begins as a copy of it, where it is changed by what is not fixed."""
        storage = self.view(x).storage
        if storage.given >= 0 or storage.kept >= 0 or (storage.tensor is not None and storage.level > Level.FIXED):
            raise UnplannableError("a weight or a state is changed where it lies")
        if level == Level.FIXED or storage.tensor is None:
            return
        begins = storage.tensor
        storage.tensor, storage.level = None, level
        if "empty" in storage.origin:
            return
        flat = torch.empty(0, dtype=torch.uint8).set_(begins.untyped_storage())
        copy = flat.clone()
        place = View(storage, torch.uint8, tuple(flat.shape), (1,), 0)
        source = View(self._new(copy, Level.FIXED, outside=True), torch.uint8, tuple(flat.shape), (1,), 0)
        self.calls.append(Call("copy_", aten.copy_.default, (place, source), {}, [place]))
