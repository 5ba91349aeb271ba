"""Runs code on tensors that have shapes but no values, and counts what it would do: FLOPs, bytes moved, bytes held.

Floating tensors are PyTorch's fake tensors. Integers are real: where documents start and which rows a chunk takes
decide what is computed, and they are small.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


@dataclass
class Calls:
    """Calls of one operator: how many, their FLOPs (a multiply-add is two), the bytes they read and write."""

    count: float = 0
    flops: float = 0
    bytes: float = 0


@dataclass
class Recorded:
    """What some code did. `calls`: by operator's name, views left out; FLOPs of matrix products, convolutions and
    attention alone. `peak`: most bytes that its tensors held at one time, `kept`: those they hold at its end, both
    beyond what there was before. `made`: how many blocks of memory of each size in bytes were made.
    """

    calls: dict[str, Calls] = field(default_factory=dict)
    peak: float = 0
    kept: float = 0
    made: Counter[float] = field(default_factory=Counter)

    @property
    def flops(self) -> float:
        return sum(calls.flops for calls in self.calls.values())

    def times(self, factor: float) -> "Recorded":
        """So many times the FLOPs and bytes, in as many calls."""
        calls = {name: Calls(c.count, c.flops * factor, c.bytes * factor) for name, c in self.calls.items()}
        return Recorded(calls, self.peak * factor, self.kept * factor, scaled(self.made, factor))


def scaled(made: Counter[float], factor: float) -> Counter[float]:
    """As many blocks of `factor` times the size."""
    return Counter({size * factor: count for size, count in made.items()})


class Tracer(TorchDispatchMode):
    """A mode in which nothing floating is computed; `record` gives what the code inside it would have done."""

    def __init__(self) -> None:
        super().__init__()
        self._live = 0
        self._fake = _fake_mode()
        self._held: dict[int, weakref.ref] = {}
        # What is being recorded, and the live bytes when that began.
        self._open: list[tuple[Recorded, int]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled: what keeps torch.compile out would be asked at every call.
        return False

    @contextmanager
    def record(self) -> Iterator[Recorded]:
        """Counts into the `Recorded` it gives; `kept` is there at the end."""
        recorded, before = opened = Recorded(), self._live
        self._open.append(opened)
        try:
            yield recorded
        finally:
            self._open.pop()
            recorded.kept = self._live - before

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
        """A tensor on the CPU that holds nothing."""
        with self._fake:
            made = torch.empty(shape, dtype=dtype, requires_grad=requires_grad)
        # Known from the start: views of it hold nothing new.
        self._hold(made)
        return made

    @contextmanager
    def filled(self, on_meta: M) -> Iterator[M]:
        """A module on `meta` that has parameters and buffers of this mode meanwhile. Called outside of the mode."""
        made: dict[int, Any] = {}
        before: list[tuple[Any, dict[str, Any]]] = [
            (own, dict(own)) for part in on_meta.modules() for own in (part._parameters, part._buffers)
        ]
        for own, tensors in before:
            own.update({n: made.setdefault(id(x), self._like(x)) for n, x in tensors.items() if x is not None})
        try:
            yield on_meta
        finally:
            for own, tensors in before:
                own.update(tensors)

    def _like(self, x: Tensor) -> Tensor:
        if not _floating(x):
            return torch.zeros(x.shape, dtype=x.dtype)
        fake = self.empty(*x.shape, dtype=x.dtype)
        return nn.Parameter(fake, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CPU
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if not any(_floating(x) for x in given) and (given or _makes_integers(func, args, kwargs)):
            return func(*args, **kwargs)
        if func.overloadpacket is aten._local_scalar_dense:
            # Asked of an empty past alone: how many tokens it has seen.
            return 0
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = (args[0], _without_masks(args[1]), *args[2:])
        out = self._run(func, args, kwargs, given)
        made = [x for x in tree_iter(out) if isinstance(x, FakeTensor)]
        for tensor in made:
            self._hold(tensor)
        if self._open and not func.is_view and func.namespace != "prim":
            self._count(func, _flops(func, args, kwargs, out), [x for x in (*given, *made) if _floating(x)])
        return out

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
        """The results' shapes. Where all tensors are fake, by PyTorch's kernels for `meta` themselves: the mode of fake
        tensors finds the same, ten times slower.
        """
        fake = given and all(isinstance(x, FakeTensor) for x in given)
        # What asks for a device by name would have it.
        if fake and func.namespace == "aten" and kwargs.get("device") is None:
            with contextlib.suppress(NotImplementedError), in_kernel_invocation_manager(self._fake):
                return tree_map_only(Tensor, self._faked, func(*args, **kwargs))
        with self._fake:
            return func(*args, **kwargs)

    def _faked(self, x: Tensor) -> FakeTensor:
        return x if isinstance(x, FakeTensor) else FakeTensor(self._fake, x, CPU)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._held and self._held[key]() is storage:
            return

        def forget(_: Any) -> None:
            self._live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, forget)
        self._live += size
        for recorded, before in self._open:
            recorded.made[size] += 1
            recorded.peak = max(recorded.peak, self._live - before)

    def _count(self, func: Any, flops: int, tensors: Sequence[Tensor]) -> None:
        moved = sum(x.nbytes for x in tensors)
        for recorded, _ in self._open:
            calls = recorded.calls.setdefault(str(func.overloadpacket), Calls())
            calls.count += 1
            calls.flops += flops
            calls.bytes += moved


@cache
def _fake_mode() -> FakeTensorMode:
    # One for all: it takes as long to make as a small trace, and keeps shapes that it has found.
    return FakeTensorMode(allow_non_fake_inputs=True)


def _floating(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.dtype.is_floating_point or x.dtype.is_complex


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places of each real mask instead of the mask, whose count a fake tensor would not know."""
    chosen: list[Tensor | None] = []
    for index in indices:
        masked = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        chosen.extend(index.nonzero(as_tuple=True) if masked and index is not None else (index,))
    return chosen


def _makes_integers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a factory makes whole numbers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    if func.overloadpacket in (aten.arange, aten.full):
        return all(isinstance(x, int) for x in args if not isinstance(x, list | tuple))
    return func.overloadpacket in (aten.randint, aten.randperm, aten.tril_indices, aten.triu_indices)


def _flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    if func.overloadpacket in _FLOPS:
        return _FLOPS[func.overloadpacket](*args)
    known = flop_registry.get(func.overloadpacket)
    return 0 if known is None else known(*args, **kwargs, out_val=out)


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    """Of softmax attention on the CPU, `[B,H,T,K]`: half the pairs where it is causal, as its kernel skips the rest."""
    pairs = q.shape[:3].numel() * k.shape[2]
    causal = len(others) > 1 and others[1]
    return 2 * pairs * (q.shape[3] + v.shape[3]) // (2 if causal else 1)


def _attention_backward_flops(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    """Recomputed scores, and the gradients of scores, q, k and v: five products where forward has two."""
    return _attention_flops(q, k, v, *others[2:]) * 5 // 2


def _sum_flops(_: Tensor, left: Tensor, right: Tensor) -> int:
    """Of a product added in place, `[...,N,K] @ [...,K,M]`: PyTorch's own table has only those that are not."""
    return 2 * left.numel() * right.shape[-1]


_FLOPS: dict[Any, Callable[..., int]] = {
    aten.addmm_: _sum_flops,
    aten.baddbmm_: _sum_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
