"""Triton's interpreter, patched and instrumented: kernels run on the CPU, and each launch records its memory accesses.

Triton reads `TRITON_INTERPRET=1` when it is first imported and when a kernel is defined, so a process either interprets
or compiles. In a process that interprets, `backend="triton"` takes CPU tensors and installs this module by itself:

    with recording(order="shuffled") as launches:
        linear_attention(q, k, v, backend="triton")
    launches[0].traffic["k"].read                      # bytes, each counted once
    assert_no_races(launches)

Patched, of Triton 3.9: bfloat16 is computed in float32 and rounded to nearest (stock: on raw 16-bit patterns, and casts
truncate); comparisons give booleans; the numbers of `range` have `.to` and `.dtype`; float32 products of precision tf32
round their operands; custom scans go row by row; modules are patched once. An access outside the memory
of a launch's tensors is an error that names the kernel.
"""

import builtins
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

from seqtrain.kernels import gpu
from seqtrain.kernels.inspect.targets import by_name, use_target

Order = Literal["given", "reversed", "shuffled"]
_builder = stock.interpreter_builder
_Handle = stock.TensorHandle
_COMPARISONS = (np.less_equal, np.less, np.greater, np.greater_equal, np.equal, np.not_equal)
# What `install` replaces: an owner, the name of its attribute, and what stands there then.
_patches: list[tuple[Any, str, Any]] = []


def _patch(owner: Any, *names: str) -> Callable[[Callable], Callable]:
    """Has `install` put a function in place of methods of `owner`; it takes the stock method after `self`."""

    def register(function: Callable) -> Callable:
        _patches.extend((owner, name, partialmethod(function, getattr(owner, name))) for name in names)
        return function

    return register


# What a launch did.


@dataclass
class Traffic:
    """Bytes of one tensor (or of tensors that share memory) that a launch accessed, each element counted once.

    rewritten: elements that more than one program wrote. crossed: elements that one program read and another wrote.
    repeated: elements that one store wrote more than once.
    """

    read: int = 0
    written: int = 0
    rewritten: int = 0
    crossed: int = 0
    repeated: int = 0


@dataclass
class LaunchRecord:
    """A launch: its kernel, grid, matrix products, and its traffic by tensor (names of arguments)."""

    kernel: str
    grid: tuple[int, ...]
    dots: int = 0
    dot_flops: int = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes read and written, each element counted once for either."""
        return sum(each.read + each.written for each in self.traffic.values())


class _Memory:
    """One storage that a launch was given, and which program accessed which of its elements."""

    def __init__(self, tensor: Tensor, watched: bool):
        storage = tensor.untyped_storage()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.size = tensor.element_size()
        self.names: list[str] = []
        count = storage.nbytes() // self.size if watched else 0
        self.reader = np.full(count, -1, np.int32)  # the program that read an element: -1 none, -2 several
        self.writer = np.full(count, -1, np.int32)
        self.order = np.zeros(count, np.int32)
        self.repeated = 0

    def traffic(self) -> Traffic:
        read, written = self.reader != -1, self.writer != -1
        crossed = read & written & (self.reader != self.writer)
        return Traffic(
            read=int(read.sum()) * self.size,
            written=int(written.sum()) * self.size,
            rewritten=int((self.writer == -2).sum()),
            crossed=int(crossed.sum()),
            repeated=self.repeated,
        )


class _Watch:
    """The running launch."""

    def __init__(self, kernel: str, arguments: dict[str, Any], watched: bool):
        self.kernel, self.watched, self.program = kernel, watched, 0
        self.record = LaunchRecord(kernel, ())
        self.memories: dict[int, _Memory] = {}
        for name, value in by_name(arguments).items():
            tensor = getattr(value, "base", value) if hasattr(value, "block_shape") else value
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                key = tensor.untyped_storage().data_ptr()
                self.memories.setdefault(key, _Memory(tensor, watched)).names.append(name)

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int, *, write: bool) -> None:
        places = pointers[np.broadcast_to(mask, pointers.shape)]
        if not places.size:
            return
        low, high = int(places.min()), int(places.max()) + size
        memory = next((m for m in self.memories.values() if m.start <= low and high <= m.end), None)
        if memory is None:
            raise IndexError(f"{self.kernel}: {'write' if write else 'read'} outside of its tensors")
        if not self.watched:
            return
        if size != memory.size:
            raise TypeError(f"{self.kernel}: {'+'.join(memory.names)} is accessed by {size} bytes, has {memory.size}")
        index = ((places - np.uint64(memory.start)) // np.uint64(size)).astype(np.int64).ravel()
        by = memory.writer if write else memory.reader
        before = by[index]
        by[index] = np.where((before == -1) | (before == self.program), self.program, -2)
        if write:
            number = np.arange(index.size, dtype=np.int32)
            memory.order[index] = number
            memory.repeated += int((memory.order[index] != number).sum())

    def finish(self, grid: tuple[int, ...]) -> LaunchRecord:
        self.record.grid = grid
        self.record.traffic = {"+".join(m.names): m.traffic() for m in self.memories.values()}
        return self.record


@dataclass
class _Recorder:
    order: Order = "given"
    seed: int = 0
    watched: bool = False
    launches: list[LaunchRecord] = field(default_factory=list)

    def programs(self, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
        programs = list(itertools.product(*(range(size) for size in grid)))
        if self.order == "reversed":
            programs.reverse()
        elif self.order == "shuffled":
            random.Random(self.seed + len(self.launches)).shuffle(programs)
        return programs


_recorder = _Recorder()
_watch: _Watch | None = None


@contextmanager
def recording(*, order: Order = "given", seed: int = 0) -> Iterator[list[LaunchRecord]]:
    """Collects the launches made inside; their programs run in the given order."""
    global _recorder
    before, _recorder = _recorder, _Recorder(order, seed, watched=True)
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def assert_no_races(launches: list[LaunchRecord]) -> None:
    """Raises `AssertionError` for elements written by several programs, or read by one and written by another."""
    for launch in launches:
        for name, each in launch.traffic.items():
            found = {"rewritten": each.rewritten, "crossed": each.crossed, "repeated": each.repeated}
            assert not any(found.values()), f"{launch.kernel}: {name}: {found}"


# Inputs that reveal reads of what no kernel should read.


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Inside, `torch.empty` and its like are filled with NaN (integers with their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def between_nans(x: Tensor, rows: int = 64) -> Tensor:
    """A contiguous copy of `x` in memory with `rows` tokens (dimension 1) of NaN before and after it."""
    margin = rows * x[0, 0].numel()
    memory = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype)
    inner = memory[margin : margin + x.numel()].view(x.shape)
    return inner.copy_(x)


# bfloat16 as float32.


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> np.ndarray:
    """The numbers of a handle; of bfloat16 ones, as float32."""
    if not _is_bf16(handle):
        return handle.data
    return (np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(x: np.ndarray, drop: int) -> np.ndarray:
    """float32 numbers as bits, rounded to nearest even, but for their lowest `drop` bits; NaN and infinity stay."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    half, last = np.uint32((1 << (drop - 1)) - 1), (bits >> np.uint32(drop)) & np.uint32(1)
    with np.errstate(over="ignore"):
        nearest = bits + half + last
    return np.where(np.isfinite(x), nearest, bits | (np.isnan(x).astype(np.uint32) << np.uint32(22)))


def _to_bf16(x: np.ndarray) -> Any:
    return _Handle((_rounded(x, 16) >> np.uint32(16)).astype(np.uint16), tl.bfloat16)


def _to_tf32(x: np.ndarray) -> np.ndarray:
    return (_rounded(x, 13) & np.uint32(0xFFFFE000)).view(np.float32)


@_patch(stock.InterpreterBuilder, "binary_op", "ternary_op", "unary_op", "create_fma", "create_rsqrt")
def _compute(self: Any, plain: Callable, *operands: Any) -> Any:
    handles, op = [x for x in operands if isinstance(x, _Handle)], operands[-1]
    with np.errstate(all="ignore"):
        if op in _COMPARISONS:
            return _Handle(op(*map(_wide, handles)), tl.int1)
        if op is np.where or not _is_bf16(handles[-1]):
            return plain(self, *operands)
        wide = [_Handle(_wide(x), tl.float32) if _is_bf16(x) else x for x in handles]
        return _to_bf16(plain(self, *wide, *operands[len(handles) :]).data)


@_patch(stock.InterpreterBuilder, "cast_impl")
def _cast(self: Any, plain: Callable, source: Any, kind: Any) -> Any:
    with np.errstate(all="ignore"):
        if _is_bf16(source) and kind.scalar != tl.bfloat16:
            source = _Handle(_wide(source), tl.float32)
        if kind.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _to_bf16(source.data.astype(np.float32))
        return plain(self, source, kind)


@_patch(stock.InterpreterBuilder, "create_fp_to_fp")
def _convert(self: Any, plain: Callable, source: Any, kind: Any, rounding: Any) -> Any:
    return self.cast_impl(source, kind)


@_patch(stock.InterpreterBuilder, "create_dot")
def _dot(self: Any, plain: Callable, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
    left, right = _wide(a), _wide(b)
    if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        left, right = _to_tf32(left), _to_tf32(right)
    if _watch is not None:
        _watch.record.dots += 1
        _watch.record.dot_flops += 2 * left.size * right.shape[-1]
    wide = np.float64 if d.data.dtype == np.float64 else np.float32
    product = np.matmul(left.astype(wide, copy=False), right.astype(wide, copy=False))
    return _Handle((product + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)


# Memory.


def _see(pointers: Any, mask: Any, *, write: bool) -> None:
    if _watch is not None:
        size = stock._get_np_dtype(pointers.get_element_ty()).itemsize
        _watch.access(pointers.data, mask.data, size, write=write)


@_patch(stock.InterpreterBuilder, "create_masked_load")
def _load(self: Any, plain: Callable, pointers: Any, mask: Any, *options: Any, **named: Any) -> Any:
    _see(pointers, mask, write=False)
    return plain(self, pointers, mask, *options, **named)


@_patch(stock.InterpreterBuilder, "create_masked_store")
def _store(self: Any, plain: Callable, pointers: Any, value: Any, mask: Any, *options: Any, **named: Any) -> Any:
    _see(pointers, mask, write=True)
    return plain(self, pointers, value, mask, *options, **named)


@_patch(stock.InterpreterBuilder, "create_atomic_rmw")
def _atomic(self: Any, plain: Callable, op: Any, pointers: Any, value: Any, *options: Any, **named: Any) -> Any:
    if _is_bf16(value):
        raise TypeError("atomics on bfloat16 are not interpreted: sum in float32")
    return plain(self, op, pointers, value, *options, **named)


# Scans with a custom function: along the axis, row by row.


def _tensor(data: np.ndarray, kind: Any) -> Any:
    return tl.tensor(_Handle(data, kind), tl.block_type(kind, list(data.shape)))


@_patch(stock.ScanOps, "generic_scan")
def _generic_scan(self: Any, plain: Callable, operands: tuple) -> list:
    kinds = [x.dtype for x in operands]
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in operands]
    rows = [[_tensor(row, kind) for row, kind in zip(each, kinds, strict=True)] for each in zip(*arrays, strict=True)]
    found = list(itertools.accumulate(rows, lambda left, right: self.combine_fn.fn(*left, *right)))
    columns = [np.stack([x.handle.data for x in each], self.axis) for each in zip(*found, strict=True)]
    return [_tensor(column, kind) for column, kind in zip(columns, kinds, strict=True)]


def _widened(self: Any, plain: Callable, operands: tuple) -> Any:
    """Reductions and scans of bfloat16 in float32, as the GPU promotes them."""
    return plain(self, tuple(x.to(tl.float32) if x.dtype == tl.bfloat16 else x for x in operands))


for _owner in (stock.ReduceOps, stock.ScanOps):
    _patch(_owner, "apply_impl")(_widened)


# Loop variables.


class _Index(int):
    """An int that behaves like the loop variable of a compiled kernel: it has a dtype and can be cast."""

    dtype = tl.int32

    def to(self, dtype: Any, **options: Any) -> Any:
        return stock.interpreter_semantic.cast(stock.interpreter_semantic.to_tensor(int(self), False), dtype)


def _closed(name: str) -> Callable:
    plain = getattr(int, name)

    def operate(self: _Index, other: Any) -> Any:
        result = plain(self, other)
        return result if result is NotImplemented else _Index(result)

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod"):
    setattr(_Index, f"__{_name}__", _closed(f"__{_name}__"))


def _number(x: Any) -> int:
    x = x.value if isinstance(x, tl.constexpr) else x
    return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)


def _range(*bounds: Any, step: Any = 1, **options: Any) -> Iterator[_Index]:
    """`range`, `tl.range` and `tl.static_range` inside kernels; options such as num_stages change no result."""
    start, end, by = {1: (0, *bounds, step), 2: (*bounds, step), 3: bounds}[len(bounds)]
    return map(_Index, builtins.range(_number(start), _number(end), _number(by)))


@_patch(stock.FunctionRewriter, "_compile_and_exec")
def _rewrite(self: Any, plain: Callable, tree: Any) -> Any:
    self.fn.__globals__.setdefault("range", _range)
    return plain(self, tree)


# Launches.


@_patch(stock.InterpretedFunction, "__call__")
def _call_device_function(self: Any, plain: Callable, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


@_patch(stock.GridExecutor, "__call__")
def _launch(self: Any, plain: Callable, *args: Any, **kwargs: Any) -> None:
    """Runs a kernel on CPU tensors, without copies, watched."""
    global _watch
    names = inspect.signature(self.fn).parameters
    bound = inspect.getcallargs(self.fn, *args, **{name: x for name, x in kwargs.items() if name in names})
    bound = {name: getattr(x, "value", x) if isinstance(x, tl.constexpr) else x for name, x in bound.items()}
    converted = {name: x if name in self.constexprs else stock._implicit_cvt(x) for name, x in bound.items()}
    grid = tuple(self.grid({**bound, **kwargs}) if callable(self.grid) else self.grid)
    grid += (1,) * (3 - len(grid))
    _builder.set_grid_dim(*grid)
    watch = _watch = _Watch(self.fn.__name__, bound, _recorder.watched)
    try:
        for watch.program, place in enumerate(_recorder.programs(grid)):
            _builder.set_grid_idx(*place)
            self.fn(**converted)
    finally:
        _watch = None
    if _recorder.watched:
        _recorder.launches.append(watch.finish(grid))


class _NothingToRestore:
    """What `_patch_lang` returns once modules stay patched."""

    def restore(self) -> None:
        pass


_installed = False


def install() -> None:
    """Patches the interpreter of this process, for good; kernels then take CPU tensors and sm_90's configurations.

    Raises `RuntimeError` in a process where Triton was imported without `TRITON_INTERPRET=1`.
    """
    global _installed
    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise RuntimeError("Triton compiles in this process; start it with TRITON_INTERPRET=1 in the environment")
    if _installed:
        return
    _installed = True
    use_target("sm_90")
    gpu.DEVICES.symmetric_difference_update(("cuda", "cpu"))

    class Everything:
        __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012

    stock._patch_lang(Everything)
    modules = (
        (stock, "_patch_lang", lambda fn: _NothingToRestore()),
        (tl, "range", _range),
        (tl, "static_range", _range),
    )
    for owner, name, patched in (*_patches, *modules):
        setattr(owner, name, patched)
    # NVIDIA's smallest sizes, so that what could not be compiled fails here, too.
    _builder.codegen_fns["min_dot_size"] = lambda left, right: (1, 1, 16 if left.scalar.primitive_bitwidth < 32 else 8)
