"""Activations that are computed again in the backward pass instead of kept, but for what is dear to compute.

`recomputed` is `torch.utils.checkpoint` for a part of a layer. What is sent between ranks is sent once. Operators
(`SequenceContext.run`) may be kept: they run once, keep what their backward pass needs but for their inputs, and give
the same results when all around them is computed again.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqtrain.parallel.scan import COMMUNICATE, checkpoint_contexts

aten = torch.ops.aten
# Matrix products: what "products" keeps besides operators.
PRODUCTS = {
    op.default
    for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm, torch.ops.mkldnn._linear_pointwise)
    if hasattr(op, "default")
}

# What is not computed again: what was sent alone; operators but short convolutions; all operators and products.
Keep = Literal["sent", "operators", "products"]
# A pair of functions, as `torch.autograd.graph.saved_tensors_hooks` takes them.
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
UNCHANGED: Hooks = (lambda x: x, lambda x: x)
_thread = threading.local()


def recomputed(
    function: Callable[..., Any],
    *arguments: Any,
    keep: Keep,
    sends: bool,
    last: nn.Module | None = None,
    inputs: torch.dtype = torch.float32,
) -> Any:
    """`function(*arguments)`, whose activations are computed again in the backward pass, but for those of `keep`.

    The gradients are the same bits. `sends`: whether ranks exchange anything in it. `last`: a module whose products,
    and those after it, nothing needs in the backward pass: they are not kept. `inputs`: the first argument, if it is
    float32, is kept in this type, and rounded when all is computed again from it.
    """
    part: Callable[..., Any] = function
    options: dict[str, Any] = {"context_fn": checkpoint_contexts} if sends else {}
    if keep != "sent":
        part = own = _Part(function, keep, last, _top_hooks())
        if sends or keep == "products":
            options = {"context_fn": partial(create_selective_checkpoint_contexts, own.policy)}
    with nullcontext() if inputs == torch.float32 else _kept_in(inputs, arguments[0]):
        # Nothing in a layer draws random numbers, so their state needs no saving.
        return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def _kept_in(dtype: torch.dtype, x: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which autograd keeps float32 `x` in `dtype`; other tensors as they are."""
    outer_pack, outer_unpack = _top_hooks() or UNCHANGED

    def pack(saved: Tensor) -> tuple[Any, torch.dtype]:
        narrow = saved.dtype == torch.float32 and saved.data_ptr() == x.data_ptr()
        return outer_pack(saved.to(dtype) if narrow else saved), saved.dtype

    def unpack(kept: tuple[Any, torch.dtype]) -> Tensor:
        return outer_unpack(kept[0]).to(kept[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextmanager
def made_again(x: Tensor, make: Callable[[Tensor], Tensor], source: Tensor, weight: Tensor) -> Iterator[None]:
    """In it, autograd does not keep `x`, a cheap function of what it keeps anyway: `make(source)` again.

    `weight`: what `x` is multiplied by; of ZeRO 3's, which come and go, nothing changes, nor under torch.compile.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or "ds_id" in vars(weight):
        yield
        return
    outer_pack, outer_unpack = _top_hooks() or UNCHANGED
    storage = x.untyped_storage()._cdata
    # Autograd keeps the hooks, which must not keep it where all is computed again.
    given = [source.detach()]

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata != storage:
            return outer_pack(saved), None
        return outer_pack(given[0]), (saved.size(), saved.stride(), saved.storage_offset())

    def unpack(saved: tuple[Any, Any]) -> Tensor:
        held, place = saved
        found = outer_unpack(held)
        if place is None:
            return found
        with torch.no_grad():
            return make(found).as_strided(*place)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        given.clear()


def kept(call: Callable[[], Any], inputs: Sequence[Any], *, cheap: bool = False) -> Any:
    """`call()`, an operator on `inputs`, once where the part that is running keeps operators: then again its results.

    `cheap`: it is kept only where products are.
    """
    part = None if torch.compiler.is_compiling() else _running()
    return call() if part is None or not part.keeps(cheap) else part.run(call, inputs)


def _running() -> "_Part | None":
    """The part being computed on this thread, for the first time or again."""
    return getattr(_thread, "part", None)


def _top_hooks() -> Hooks | None:
    """The hooks for saved tensors that are in force."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


class _View(NamedTuple):
    """A saved tensor that lies in the memory of an operator's input."""

    slot: "_Slot"
    size: Sequence[int]
    stride: Sequence[int]
    offset: Any


@dataclass
class _Slot:
    """An operator's input, computed again when it is first asked for: PyTorch gives it once."""

    held: Any
    unpack: Callable[[Any], Tensor]
    found: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.found is None:
            self.found, self.held = self.unpack(self.held), None
        return self.found


class _Part:
    """The function that is given to `checkpoint`, which calls it again; `outer`: hooks in force around it."""

    def __init__(self, function: Callable[..., Any], keep: Keep, last: nn.Module | None, outer: Hooks | None):
        self._function, self._keep, self._last = function, keep, last
        self._pack, self._unpack = outer or UNCHANGED
        # Results of the operators that are kept, in their order, and how many have been given in this pass.
        self._results: list[Any] = []
        self._given, self._again = 0, False
        self._ended = False

    def __call__(self, *arguments: Any) -> Any:
        self._given, self._ended = 0, False
        ends = nullcontext() if self._last is None else _called(self._last, self._end)
        with ends, _on_thread(self):
            found = self._function(*arguments)
        self._again = True
        return found

    def _end(self, *_: Any) -> None:
        self._ended = True

    def policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """For operators of PyTorch."""
        kept = operator in COMMUNICATE or (self._keep == "products" and operator in PRODUCTS and not self._ended)
        # Inside an operator that is kept whole, nothing is kept a second time.
        return CheckpointPolicy.MUST_SAVE if kept and _running() is self else CheckpointPolicy.PREFER_RECOMPUTE

    def keeps(self, cheap: bool) -> bool:
        """Whether an operator of ours is kept."""
        return self._keep == "products" or (self._keep == "operators" and not cheap)

    def run(self, call: Callable[[], Any], inputs: Sequence[Any]) -> Any:
        """`call()`, an operator on these inputs; when all is computed again, what it gave the first time."""
        pack, unpack = _top_hooks() or (self._pack, self._unpack)
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.numel() and not isinstance(x, nn.Parameter)]
        slots = {x.untyped_storage()._cdata: _Slot(pack(x), unpack) for x in tensors}
        if self._again:
            self._given += 1
            return tree_map(_Result.tensor, self._results[self._given - 1])
        with _on_thread(None), torch.autograd.graph.saved_tensors_hooks(partial(self._save, slots), self._load):
            out, state = call()
        # The state of softmax attention, keys and values, is for the next call alone: its shape will do.
        told = self._result if isinstance(state, Tensor) else _ghost
        self._results.append((self._result(out), tree_map(told, state)))
        return out, state

    def _result(self, x: Tensor) -> "_Result":
        return _Result(self._pack(x.detach()), self._unpack, x.requires_grad)

    def _save(self, slots: dict[int, _Slot], x: Tensor) -> Any:
        slot = slots.get(x.untyped_storage()._cdata)
        if slot is None or x.is_conj() or x.is_neg():
            return self._pack(x)
        return _View(slot, x.size(), x.stride(), x.storage_offset())

    def _load(self, saved: Any) -> Tensor:
        if isinstance(saved, _View):
            return saved.slot.tensor().as_strided(saved.size, saved.stride, saved.offset)
        return self._unpack(saved)


@dataclass
class _Result:
    """What an operator gave."""

    held: Any
    unpack: Callable[[Any], Tensor]
    requires_grad: bool

    def tensor(self) -> Tensor:
        return self.unpack(self.held).detach().requires_grad_(self.requires_grad)


def _ghost(x: Tensor) -> _Result:
    """In place of `x`, zeros that take no memory."""
    return _Result(x.new_zeros(()).expand(x.shape), lambda held: held, x.requires_grad)


@contextmanager
def _on_thread(part: _Part | None):
    before, _thread.part = _running(), part
    try:
        yield
    finally:
        _thread.part = before


@contextmanager
def _called(module: nn.Module, before: Callable[..., None]):
    """While open, `before` is called before the module is."""
    hook = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
