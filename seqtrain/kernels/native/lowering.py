"""PyTorch's operations as instructions of a step's program.

An operation that is not here is called as it is, between two runs of the library: slower, and no less right.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from seqtrain.kernels.native.recorder import Call, Level, Storage, View

# As `Dtype` in step_elements.h numbers them.
DTYPES = {
    dtype: number
    for number, dtype in enumerate(
        (
            torch.float32,
            torch.bfloat16,
            torch.float64,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.complex128,
            torch.int32,
            torch.int8,
            torch.uint8,
        )
    )
}
MOST_DIMENSIONS = 6


class NoInstructionError(Exception):
    """There is none for this call."""


@dataclass
class Step:
    """An instruction: its sizes, and its operands with strides along them; None for one that is left out."""

    code: str
    operation: int | str
    type: int
    sizes: list[int]
    operands: list[View | None]
    strides: list[list[int]]
    ints: list[int] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    reduced: int = 0
    work: int = 0

    @property
    def out(self) -> View:
        assert self.operands[0] is not None
        return self.operands[0]


class Lowering:
    """Makes steps of calls."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._scalars: dict[Any, View] = {}

    def add(self, call: Call) -> None:
        """The steps of a call. Raises `NoInstructionError`, having added nothing."""
        plain = call.name.removesuffix("_").removesuffix("_copy")
        make: Callable[..., None] | None = SPECIAL.get(call.name) if call.special else CALLS.get(plain)
        if make is None:
            raise NoInstructionError(call.name)
        before = len(self.steps)
        try:
            if call.special:
                make(self, call)
            else:
                make(self, call.outs, *call.args, **call.kwargs)
        except (NoInstructionError, TypeError) as error:
            del self.steps[before:]
            raise NoInstructionError(call.name) from error

    def temporary(self, shape: Sequence[int], dtype: torch.dtype) -> View:
        storage = Storage(max(1, math.prod(shape)) * dtype.itemsize, Level.GIVEN)
        return contiguous_view(shape, dtype, storage)

    def scalar(self, value: Any) -> View:
        """A number as a tensor of no dimensions."""
        if value not in self._scalars:
            dtype = torch.complex128 if isinstance(value, complex) else torch.float64
            tensor = torch.tensor(value, dtype=dtype)
            self._scalars[value] = View(Storage(dtype.itemsize, Level.FIXED, tensor), dtype, (), (), 0)
        return self._scalars[value]

    def elementwise(self, operation: str, out: View, *inputs: Any) -> None:
        """`out = operation(*inputs)`, numbers among them."""
        views = [out, *(x if isinstance(x, View) else self.scalar(x) for x in inputs)]
        if not out.numel:
            return
        kind = type_of([out, *(x for x in inputs if isinstance(x, View))])
        sizes, strides = merged(out.shape, [x.expanded(out.shape).strides for x in views])
        self.steps.append(Step("elementwise", operation, kind, sizes, list(views), strides))

    def copy(self, out: View, x: Any) -> None:
        self.elementwise("copy", out, x)

    def plain(self, x: View, dtype: torch.dtype) -> View:
        """`x`, or a copy of it that is contiguous and of this dtype."""
        if x.dtype == dtype and x.contiguous:
            return x
        out = self.temporary(x.shape, dtype)
        self.copy(out, x)
        return out

    def reduce(self, operation: int, out: View, x: View, dims: Sequence[int]) -> None:
        """Over `dims`; `out` may have kept them."""
        rank = len(x.shape)
        dims = sorted({d % rank for d in dims}) if dims else list(range(rank))
        kept = [d for d in range(rank) if d not in dims]
        if not x.numel:
            raise NoInstructionError("of nothing")
        wide = out.with_dims([out.dims[d] for d in kept]) if len(out.shape) == rank else out
        first, of_first = merged([x.shape[d] for d in kept], [wide.strides, [x.strides[d] for d in kept]])
        last, of_last = merged([x.shape[d] for d in dims], [[0] * len(dims), [x.strides[d] for d in dims]])
        strides = [[*a, *b] for a, b in zip(of_first, of_last, strict=True)]
        self._fits([*first, *last])
        kind = type_of([out, x])
        self.steps.append(Step("reduce", operation, kind, [*first, *last], [out, x], strides, reduced=len(last)))

    def rowwise(
        self, operation: int, out: View, x: View, *others: View | None, dim: int = -1, eps: float = 0, ints: Any = ()
    ) -> None:
        """Along `dim`."""
        if not out.numel:
            return
        rank = len(x.shape)
        order = [d for d in range(rank) if d != dim % rank] + [dim % rank]
        views = [out, x, *others]
        wide = [None if v is None else v.expanded(x.shape).permuted(order) for v in views]
        given = [v for v in wide if v is not None]
        first, strides = merged(given[0].shape[:-1], [v.strides[:-1] for v in given])
        if rank == 1:
            first, strides = [], [[] for _ in given]
        found = iter([*s, v.strides[-1]] for s, v in zip(strides, given, strict=True))
        every = [[0] * (len(first) + 1) if v is None else next(found) for v in wide]
        self._fits(sizes := [*first, given[0].shape[-1]])
        kind = type_of(given)
        self.steps.append(Step("rowwise", operation, kind, sizes, views, every, list(ints), [eps]))

    def gather(self, out: View, x: View, index: View, dim: int, sizes: Sequence[int], strides: list[list[int]]) -> None:
        """`strides`: of out, x without `dim`, and the index, along `sizes`."""
        if not out.numel:
            return
        if index.dtype not in (torch.int64, torch.int32) or index.negated:
            raise NoInstructionError("index")
        sizes, strides = merged(sizes, strides)
        self._fits(sizes)
        ints = [x.strides[dim], x.shape[dim]]
        self.steps.append(Step("gather", 0, type_of([out, x]), sizes, [out, x, index], strides, ints))

    def product(self, out: View, x: View, y: View) -> None:
        """`[b,m,k] @ [b,k,n]`."""
        dtype = {0: torch.float32, 1: torch.float64, 2: torch.complex64, 3: torch.complex128}[type_of([out, x, y])]
        if not out.numel:
            return
        x, y = (v if v.dtype == dtype and not (v.conjugated or v.negated) else self.plain(v, dtype) for v in (x, y))
        to = out if out.dtype == dtype else self.temporary(out.shape, dtype)
        (b, m, k), n = x.shape, y.shape[2]
        strides = [[*v.strides, 0] for v in (to, x, y)]
        self.steps.append(
            Step("batched_product", 0, type_of([to]), [b, m, n, k], [to, x, y], strides, work=b * m * n * k)
        )
        if to is not out:
            self.copy(out, to)

    def linear(
        self,
        out: View,
        x: View,
        weight: View,
        bias: View | None,
        scale: View | None = None,
        *,
        group: int = 0,
        four_bits: bool = False,
    ) -> None:
        """`x W^T + bias`: x `[...,K]`, W `[N,K]`.

        Of integers: `scale`, `[N,K/group]`, factors of so many neighbors; with `four_bits`, two of them in a byte.
        """
        size, outputs = x.shape[-1], out.shape[-1]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if not weight.contiguous or (wide == torch.float64 and weight.dtype != wide):
            raise NoInstructionError("weights")
        rows = out.numel // outputs
        x, to = self._rows(x, wide), out if _has_rows(out, wide) else self.temporary(out.shape, wide)
        bias, scale = (v if v is None else self.plain(v, wide) for v in (bias, scale))
        ints = [rows, outputs, size, _row_stride(x), _row_stride(to), group, int(four_bits)]
        views = [to, x, weight, bias, scale]
        self.steps.append(
            Step("linear", 0, type_of([to]), [], views, [[] for _ in views], ints, work=rows * outputs * size)
        )
        if to is not out:
            self.copy(out, to)

    def _rows(self, x: View, dtype: torch.dtype) -> View:
        return x if _has_rows(x, dtype) else self.plain(x, dtype)

    def _fits(self, sizes: Sequence[int]) -> None:
        if len(sizes) > MOST_DIMENSIONS:
            raise NoInstructionError("dimensions")


def contiguous_view(shape: Sequence[int], dtype: torch.dtype, storage: Storage) -> View:
    """The whole of a storage."""
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    return View(storage, dtype, tuple(shape), tuple(strides), 0)


def _has_rows(x: View, dtype: torch.dtype) -> bool:
    """Whether numbers of a row are side by side, and all rows equally far apart."""
    if x.dtype != dtype or x.conjugated or x.negated or (x.shape[-1] != 1 and x.strides[-1] != 1):
        return False
    return len(merged(x.shape[:-1], [x.strides[:-1]])[0]) <= 1


def _row_stride(x: View) -> int:
    return merged(x.shape[:-1], [x.strides[:-1]])[1][0][-1]


def merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """As few dimensions as these can be walked in, at least one."""
    found: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        if found and all(own[-1] == each[d] * size for own, each in zip(steps, strides, strict=True)):
            found[-1] *= size
            for own, each in zip(steps, strides, strict=True):
                own[-1] = each[d]
            continue
        found.append(size)
        for own, each in zip(steps, strides, strict=True):
            own.append(each[d])
    if not found:
        return [1], [[0] for _ in strides]
    if len(found) > MOST_DIMENSIONS:
        raise NoInstructionError("dimensions")
    return found, steps


def type_of(views: Sequence[View]) -> int:
    """What is computed in: 0 float32, 1 float64, 2 and 3 their complex numbers."""
    dtypes = {x.dtype for x in views}
    if any(x not in DTYPES for x in dtypes):
        raise NoInstructionError("dtype")
    double = dtypes & {torch.float64, torch.complex128, torch.int64, torch.int32}
    is_complex = any(x.is_complex for x in dtypes)
    if is_complex:
        return 3 if torch.complex128 in dtypes or torch.float64 in dtypes else 2
    return 1 if double else 0


CALLS: dict[str, Callable[..., None]] = {}
SPECIAL: dict[str, Callable[[Lowering, Call], None]] = {}


def lowers(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        CALLS.update(dict.fromkeys(names, function))
        return function

    return register


def special(function: Callable[[Lowering, Call], None]) -> Callable[[Lowering, Call], None]:
    SPECIAL[function.__name__.removeprefix("_")] = function
    return function


def _simple(name: str, operation: str) -> None:
    CALLS[name] = lambda low, outs, *args, **_: low.elementwise(operation, outs[0], *args)


# Those that the library calls as PyTorch does.
SAME = """
    neg exp expm1 log log1p sqrt rsqrt reciprocal square abs sign sin cos tanh sigmoid silu relu erf floor ceil
    round trunc logical_not isnan isinf mul minimum maximum remainder floor_divide logaddexp atan2 eq ne lt le
    gt ge logical_and logical_or logical_xor where complex polar
"""
for _name in SAME.split():
    _simple(_name, _name)
for _name, _operation in (("clamp_min", "maximum"), ("clamp_max", "minimum")):
    _simple(_name, _operation)


@lowers("add")
def _add(low: Lowering, outs: list[View], a: View, b: Any, *, alpha: Any = 1) -> None:
    low.elementwise("add_scaled", outs[0], a, b, alpha) if alpha != 1 else low.elementwise("add", outs[0], a, b)


@lowers("sub")
def _sub(low: Lowering, outs: list[View], a: View, b: Any, *, alpha: Any = 1) -> None:
    low.elementwise("add_scaled", outs[0], a, b, -alpha) if alpha != 1 else low.elementwise("sub", outs[0], a, b)


CALLS["fill"] = lambda low, outs, x, value: low.copy(outs[0], value)
CALLS["rsub"] = lambda low, outs, a, b, alpha=1: low.elementwise("add_scaled", outs[0], b, a, -alpha)
CALLS["zero"] = lambda low, outs, x: low.copy(outs[0], 0.0)
CALLS["copy"] = lambda low, outs, to, x, non_blocking=False: low.copy(outs[0], x)
# Out of place, `_to_copy`, whose end says so.
for _name in ("_to", "clone", "resolve_conj", "resolve_neg"):
    CALLS[_name] = lambda low, outs, x, *args, **options: low.copy(outs[0], x)


@lowers("pow")
def _pow(low: Lowering, outs: list[View], x: Any, exponent: Any) -> None:
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal", 1: "copy"}
    if not isinstance(exponent, View) and exponent in known:
        low.elementwise(known[exponent], outs[0], x)
    else:
        low.elementwise("pow", outs[0], x, exponent)


@lowers("div")
def _div(low: Lowering, outs: list[View], a: View, b: Any, *, rounding_mode: str | None = None) -> None:
    if rounding_mode == "trunc":
        raise NoInstructionError("div")
    low.elementwise("div" if rounding_mode is None else "floor_divide", outs[0], a, b)


def _on_bools(operation: str) -> Callable[..., None]:
    def lower(low: Lowering, outs: list[View], *args: Any) -> None:
        if outs[0].dtype != torch.bool:
            raise NoInstructionError(operation)
        low.elementwise(operation, outs[0], *args)

    return lower


for _name in ("and", "or", "xor", "not"):
    CALLS[f"bitwise_{_name}"] = CALLS[f"__{_name}__"] = _on_bools(f"logical_{_name}")


@lowers("gelu")
def _gelu(low: Lowering, outs: list[View], x: View, *, approximate: str = "none") -> None:
    low.elementwise("gelu" if approximate == "none" else "gelu_tanh", outs[0], x)


@lowers("elu")
def _elu(low: Lowering, outs: list[View], x: View, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> None:
    if scale != 1 or input_scale != 1:
        raise NoInstructionError("elu")
    low.elementwise("elu", outs[0], x, alpha)


@lowers("softplus")
def _softplus(low: Lowering, outs: list[View], x: View, beta: Any = 1, threshold: Any = 20) -> None:
    low.elementwise("softplus", outs[0], x, beta, threshold)


@lowers("leaky_relu")
def _leaky_relu(low: Lowering, outs: list[View], x: View, slope: Any = 0.01) -> None:
    low.elementwise("leaky_relu", outs[0], x, slope)


@lowers("log_sigmoid_forward")
def _log_sigmoid(low: Lowering, outs: list[View], x: View) -> None:
    low.elementwise("log_sigmoid", outs[0], x)


@lowers("masked_fill")
def _masked_fill(low: Lowering, outs: list[View], x: View, mask: View, value: Any) -> None:
    low.elementwise("where", outs[0], mask, value, x)


@lowers("clamp")
def _clamp(low: Lowering, outs: list[View], x: View, min: Any = None, max: Any = None) -> None:
    for operation, bound in (("maximum", min), ("minimum", max)):
        if bound is not None:
            low.elementwise(operation, outs[0], x, bound)
            x = outs[0]


@lowers("addcmul")
def _addcmul(low: Lowering, outs: list[View], x: View, a: View, b: View, *, value: Any = 1) -> None:
    if value != 1:
        scaled = low.temporary(outs[0].shape, outs[0].dtype)
        low.elementwise("mul", scaled, a, value)
        a = scaled
    low.elementwise("add_scaled", outs[0], x, a, b)


@lowers("lerp")
def _lerp(low: Lowering, outs: list[View], x: View, end: View, weight: Any) -> None:
    between = low.temporary(outs[0].shape, outs[0].dtype)
    low.elementwise("sub", between, end, x)
    low.elementwise("add_scaled", outs[0], x, between, weight)


@lowers("cat")
def _cat(low: Lowering, outs: list[View], tensors: Sequence[View], dim: int = 0) -> None:
    out, start = outs[0], 0
    for x in tensors:
        if len(x.shape) == 1 and x.shape[0] == 0:
            continue
        length = x.shape[dim]
        low.copy(out.narrowed(dim % len(out.shape), start, length), x)
        start += length


@lowers("stack")
def _stack(low: Lowering, outs: list[View], tensors: Sequence[View], dim: int = 0) -> None:
    dim %= len(outs[0].shape)
    for n, x in enumerate(tensors):
        place = outs[0].narrowed(dim, n, 1)
        low.copy(place.with_dims(place.dims[:dim] + place.dims[dim + 1 :]), x)


@lowers("constant_pad_nd")
def _pad(low: Lowering, outs: list[View], x: View, pad: Sequence[int], value: Any = 0) -> None:
    low.copy(outs[0], value)
    inner = outs[0]
    for n in range(len(pad) // 2):
        before, after, dim = pad[2 * n], pad[2 * n + 1], len(x.shape) - 1 - n
        if before < 0:
            x, before = x.narrowed(dim, -before, x.shape[dim] + before), 0
        if after < 0:
            x = x.narrowed(dim, 0, x.shape[dim] + after)
        inner = inner.narrowed(dim, before, x.shape[dim])
    low.copy(inner, x)


@lowers("repeat")
def _repeat(low: Lowering, outs: list[View], x: View, repeats: Sequence[int]) -> None:
    wide = [(1, 0)] * (len(repeats) - len(x.shape)) + x.dims
    to, of = [], []
    for times, (size, stride), (_, out_stride) in zip(repeats, wide, outs[0].dims, strict=True):
        to += [(times, out_stride * size), (size, out_stride)]
        of += [(times, 0), (size, stride)]
    low.copy(outs[0].with_dims(to), x.with_dims(of))


@lowers("flip")
def _flip(low: Lowering, outs: list[View], x: View, dims: Sequence[int]) -> None:
    turned, offset = x.dims, 0
    for d in dims:
        size, stride = turned[d]
        turned[d], offset = (size, -stride), offset + (size - 1) * stride
    low.copy(outs[0], x.with_dims(turned, offset))


def _reduction(operation: int) -> Callable[..., None]:
    def lower(low: Lowering, outs: list[View], x: View, dim: Any = (), keepdim: bool = False, **_: Any) -> None:
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        low.reduce(operation, outs[0], x, dims)

    return lower


# As `Reduction` in step_elements.h numbers them; of truth, any is the most and all the least.
for _name, _number in {"sum": 0, "mean": 1, "amax": 2, "amin": 3, "prod": 4, "any": 2, "all": 3}.items():
    CALLS[_name] = _reduction(_number)


@lowers("argmax")
def _argmax(low: Lowering, outs: list[View], x: View, dim: int | None = None, keepdim: bool = False) -> None:
    low.reduce(5, outs[0], x, [] if dim is None else [dim])


@lowers("linalg_vector_norm")
def _vector_norm(low: Lowering, outs: list[View], x: View, ord: Any = 2, dim: Any = None, *rest: Any, **_: Any) -> None:
    if ord != 2 or x.dtype.is_complex:
        raise NoInstructionError("linalg_vector_norm")
    squares = low.temporary(x.shape, outs[0].dtype)
    low.elementwise("square", squares, x)
    low.reduce(0, outs[0], squares, list(dim or ()))
    low.elementwise("sqrt", outs[0], outs[0])


def _along(operation: int) -> Callable[..., None]:
    return lambda low, outs, x, dim, *_, **__: low.rowwise(operation, outs[0], x, dim=dim)


# As `RowWise` numbers them.
for _name, _number in {"_softmax": 0, "_log_softmax": 1, "cumsum": 2, "cumprod": 3}.items():
    CALLS[_name] = _along(_number)


@lowers("logsumexp")
def _logsumexp(low: Lowering, outs: list[View], x: View, dim: Any, keepdim: bool = False) -> None:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) != 1:
        raise NoInstructionError("logsumexp")
    d = dims[0] % len(x.shape)
    shares = low.temporary(x.shape, outs[0].dtype)
    low.rowwise(1, shares, x, dim=d)
    # x less the logarithm of its share, the same anywhere along the dimension.
    first, share = x.narrowed(d, 0, 1), shares.narrowed(d, 0, 1)
    wide = outs[0] if keepdim else outs[0].with_dims([*outs[0].dims[:d], (1, 0), *outs[0].dims[d:]])
    low.elementwise("sub", wide, first, share)


@lowers("native_layer_norm")
def _layer_norm(
    low: Lowering, outs: list[View], x: View, shape: Sequence[int], weight: View | None, bias: View | None, eps: float
) -> None:
    if len(shape) != 1:
        raise NoInstructionError("native_layer_norm")
    low.rowwise(4, outs[0], x, weight, bias, eps=eps)


@lowers("_fused_rms_norm")
def _rms_norm(
    low: Lowering, outs: list[View], x: View, shape: Sequence[int], weight: View | None, eps: float | None
) -> None:
    if len(shape) != 1:
        raise NoInstructionError("_fused_rms_norm")
    low.rowwise(5, outs[0], x, weight, None, eps=torch.finfo(x.dtype).eps if eps is None else eps, ints=[0, 0])


@special
def _gated_norm(low: Lowering, call: Call) -> None:
    x, weight, gate = call.args
    options = call.options
    low.rowwise(5, call.outs[0], x, weight, gate, eps=options["eps"], ints=[options["silu"], options["gate_first"]])


@lowers("index_select")
def _index_select(low: Lowering, outs: list[View], x: View, dim: int, index: View) -> None:
    out, dim = outs[0], dim % max(1, len(x.shape))
    of_x = [0 if d == dim else s for d, s in enumerate(x.strides)]
    of_index = [index.strides[0] if d == dim and index.shape else 0 for d in range(len(x.shape))]
    low.gather(out, x, index, dim, out.shape, [list(out.strides), of_x, of_index])


@lowers("embedding")
def _embedding(low: Lowering, outs: list[View], weight: View, index: View, *_: Any) -> None:
    _take_rows(low, outs[0], weight, index, 0)


@lowers("index")
def _index(low: Lowering, outs: list[View], x: View, indices: Sequence[View | None]) -> None:
    given = [(n, index) for n, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise NoInstructionError("index")
    _take_rows(low, outs[0], x, given[0][1], given[0][0])


def _take_rows(low: Lowering, out: View, x: View, index: View, dim: int) -> None:
    """`x[:, ..., index, ...]`: the index's dimensions in the place of `dim`."""
    before, after, many = x.strides[:dim], x.strides[dim + 1 :], len(index.shape)
    of_x = [*before, *many * (0,), *after]
    of_index = [*len(before) * (0,), *index.strides, *len(after) * (0,)]
    low.gather(out, x, index, dim, out.shape, [list(out.strides), of_x, of_index])


@lowers("gather")
def _gather(low: Lowering, outs: list[View], x: View, dim: int, index: View, **_: Any) -> None:
    dim %= len(x.shape)
    of_x = [0 if d == dim else s for d, s in enumerate(x.strides)]
    low.gather(outs[0], x, index, dim, index.shape, [list(outs[0].strides), of_x, list(index.strides)])


@lowers("bmm")
def _bmm(low: Lowering, outs: list[View], x: View, y: View) -> None:
    low.product(outs[0], x, y)


@lowers("mm")
def _mm(low: Lowering, outs: list[View], x: View, y: View) -> None:
    weight = y.permuted([1, 0])
    if y.storage.level < Level.GIVEN and weight.contiguous and y.dtype in (torch.float32, torch.float64, x.dtype):
        low.linear(outs[0], x, weight, None)
    else:
        low.product(*(v.with_dims([(1, 0), *v.dims]) for v in (outs[0], x, y)))


@lowers("addmm")
def _addmm(low: Lowering, outs: list[View], bias: View, x: View, y: View, *, beta: Any = 1, alpha: Any = 1) -> None:
    if beta != 1 or alpha != 1:
        raise NoInstructionError("addmm")
    product = low.temporary(outs[0].shape, outs[0].dtype)
    _mm(low, [product], x, y)
    low.elementwise("add", outs[0], product, bias)


@lowers("baddbmm")
def _baddbmm(low: Lowering, outs: list[View], c: View, x: View, y: View, *, beta: Any = 1, alpha: Any = 1) -> None:
    product = low.temporary(outs[0].shape, outs[0].dtype)
    low.product(product, x, y)
    if beta != 1:
        low.elementwise("mul", outs[0], c, beta)
        c = outs[0]
    low.elementwise("add_scaled", outs[0], c, product, alpha)


@special
def _linear(low: Lowering, call: Call) -> None:
    low.linear(call.outs[0], *call.args, **call.options)


@special
def _recurrence(low: Lowering, call: Call) -> None:
    q, k, v, beta, log_decay, read, erase, state = call.args
    out, after = call.outs
    if state.dtype not in (torch.float32, torch.float64) or not after.contiguous:
        raise NoInstructionError("recurrence")
    state = low.plain(state, state.dtype)
    decay = (
        log_decay if log_decay is None or len(log_decay.shape) == 3 else log_decay.with_dims([*log_decay.dims, (1, 0)])
    )
    beta = beta if beta is None else beta.with_dims([*beta.dims, (1, 0)])
    views = [out, q, k, v, beta, decay, read, erase, state, after]
    sizes = list(q.shape[:2])
    strides = [[0] * 3 if x is None else list(x.strides[:3]) for x in views]
    key, value = q.shape[2], v.shape[2]
    ints = [key, value, int(log_decay is not None and len(log_decay.shape) == 3)]
    work = sizes[0] * sizes[1] * key * value
    kind = int(state.dtype == torch.float64)
    low.steps.append(Step("recurrence", 0, kind, sizes, views, strides, ints, [call.options["scale"]], work=work))


@special
def _convolution(low: Lowering, call: Call) -> None:
    x, weight, bias, state = call.args
    out, after = call.outs
    state = low.plain(state, after.dtype)
    if after.dtype not in (torch.float32, torch.float64) or not after.contiguous:
        raise NoInstructionError("convolution")
    views = [out, x, weight, bias, state, after]
    strides = [
        list(out.strides),
        list(x.strides),
        list(weight.strides),
        [0, 0] if bias is None else [0, bias.strides[0]],
        [0, 0],
        [0, 0],
    ]
    options = call.options
    ints = [weight.shape[1], options["dilation"], state.shape[1], int(options["silu"])]
    low.steps.append(Step("convolution", 0, int(after.dtype == torch.float64), list(x.shape), views, strides, ints))


@special
def _attention(low: Lowering, call: Call) -> None:
    q, k, v, past_k, past_v, length = call.args
    (out,) = call.outs
    views = [out, q, k, v, past_k, past_v, length]
    strides = [list(x.strides[:3]) for x in (out, q, k, v)] + [[0] * 3, [0] * 3, [length.strides[0], 0, 0]]
    batch, heads, key = q.shape
    options = call.options
    kind = 1 if torch.float64 in (q.dtype, k.dtype) else 0
    ints = [key, v.shape[2], 3 * options["kept"]]
    scalars = [options["scale"], options["cap"]]
    sizes = [batch, heads, k.shape[1]]
    low.steps.append(Step("attention", 0, kind, sizes, views, strides, ints, scalars, work=1 << 30))
