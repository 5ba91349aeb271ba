"""The time in which a processor can make the matrix products of a chunked recurrence, and nothing else.

The products are those of the chunk form, on the chunk's own shapes, with operands in cache, by PyTorch's
`at::native::cpublas::brgemm` where its library exports it, else by `torch.bmm` over all chunks at once.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from seqtrain.kernels.chunk_form import chunk_length
from seqtrain.kernels.native import build

# Rows, columns and depth of a product.
Product = tuple[int, int, int]

_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllb"
_ROUTINES = {torch.float32: f"{_BRGEMM}PKfS3_Pfb", torch.bfloat16: f"{_BRGEMM}PKN3c108BFloat16ES5_Pfb"}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
# Whether the processor multiplies a dtype with its right operand packed, by the dtype's number in PyTorch.
_COULD_PACK = "_ZN2at6native7cpublas10could_packEN3c1010ScalarTypeE"
_NUMBERS = {torch.float32: 6, torch.bfloat16: 15}


def delta_rule_products(chunk: int, key: int, value: int, *, backward: bool) -> list[Product]:
    """Those of one chunk of the gated delta rule, its triangular solve counted as a full product."""
    pairs, read = (chunk, chunk, key), (chunk, value, key)
    inner, update = (chunk, value, chunk), (key, value, chunk)
    forward = [pairs, pairs, read, read, inner, inner, update]
    if not backward:
        return forward
    # States and errors once more; then gradients of written values, pairs, queries, keys and the state.
    again = [pairs, pairs, read, inner, update]
    rows = [(chunk, key, chunk)] * 4 + [(chunk, key, value)] * 3
    return [*forward, *again, inner, read, inner, (chunk, chunk, value), (chunk, chunk, value), *rows, update, update]


def linear_attention_products(chunk: int, key: int, value: int, *, backward: bool) -> list[Product]:
    """Those of one chunk of linear attention."""
    pairs, read = (chunk, chunk, key), (chunk, value, key)
    inner, update = (chunk, value, chunk), (key, value, chunk)
    forward = [pairs, read, inner, update]
    if not backward:
        return forward
    again = [pairs, update]
    rows = [(chunk, key, chunk)] * 2 + [(chunk, key, value)] * 2
    return [*forward, *again, inner, read, (chunk, chunk, value), *rows, update]


PRODUCTS = {
    "delta_rule": delta_rule_products,
    "scalar_decay": linear_attention_products,
    "channel_decay": linear_attention_products,
}


def gemm_limit(
    operator: str, *, tokens: int, heads: int, key: int, value: int, dtype: torch.dtype, backward: bool
) -> Callable[[], object]:
    """What makes all products of `tokens` tokens (of all sequences) in PyTorch's number of threads, once a call."""
    chunk = chunk_length(key, value)
    products = PRODUCTS[operator](chunk, key, value, backward=backward)
    repeats = -(-tokens // chunk) * heads
    if limit_source(dtype) == "torch.bmm":
        return lambda: _by_bmm(products, repeats, dtype)
    array = (ctypes.c_int64 * (3 * len(products)))(*(size for product in products for size in product))
    run = build.library().seqtrain_products
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_bool]
    routine, release = _address(_ROUTINES[dtype]), _address(_RELEASE)
    return lambda: run(routine, release, array, len(products), repeats, torch.get_num_threads(), _packs(dtype))


@cache
def limit_source(dtype: torch.dtype) -> str:
    """What makes the products: PyTorch's brgemm or torch.bmm."""
    needed = (_ROUTINES.get(dtype, ""), _RELEASE, _COULD_PACK)
    found = build.unavailable() is None and all(_address(symbol) for symbol in needed)
    return "at::native::cpublas::brgemm" if found else "torch.bmm"


@cache
def _packs(dtype: torch.dtype) -> bool:
    address = _address(_COULD_PACK)
    if dtype == torch.float32 or not address:
        return False
    return bool(ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int8)(address)(_NUMBERS[dtype]))


@cache
def _address(symbol: str) -> int | None:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _by_bmm(products: list[Product], repeats: int, dtype: torch.dtype) -> None:
    for rows, columns, depth in products:
        torch.bmm(*_operands(repeats, rows, columns, depth, dtype))


@cache
def _operands(repeats: int, rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(repeats, rows, depth).to(dtype), torch.randn(repeats, depth, columns).to(dtype)
