"""What the operators' benchmark times: our operators and their rivals, over shared inputs."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels import delta_rule, diagonal_scan, linear_attention, softmax_attention, tensor_attention
from seqtrain.kernels.chunk_form import chunk_length
from seqtrain.kernels.native import build

# What is timed: `run(backward)` makes a forward pass, or a forward and backward pass.
Contender = Callable[[bool], object]


@dataclass(frozen=True)
class Shape:
    """One point of a sweep."""

    tokens: int
    batch: int
    heads: int
    key_width: int
    value_width: int
    tensor_key_width: int
    window: int
    dtype: str
    device: str
    threads: int


def contender(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Contender:
    """`function(*tensors)` gives the output; gradients are taken of all of `tensors`."""

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = function(*tensors)
        if backward:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


# Each operator and what it is given, by the names of `make_inputs`.
OPERATORS: dict[str, tuple[Callable[..., tuple[Tensor, Any]], tuple[str, ...]]] = {
    "delta_rule": (delta_rule, ("q", "k", "v", "beta", "log_decay")),
    "scalar_decay": (linear_attention, ("q", "k", "v", "log_decay")),
    "channel_decay": (linear_attention, ("q", "k", "v", "channel_decay")),
    "kda": (delta_rule, ("q", "k", "v", "beta", "channel_decay")),
    "diagonal_scan": (diagonal_scan, ("x", "log_a")),
    "tensor_attention": (tensor_attention, ("tq", "tk1", "tk2", "v", "v2")),
    "sliding_attention": (softmax_attention, ("q", "k", "v")),
}


def make_inputs(shape: Shape) -> dict[str, Tensor]:
    """The tensors all contenders share: queries, keys of length one, values, gates."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(shape.batch, shape.tokens, *sizes, generator=generator)

    heads, channels = shape.heads, shape.heads * shape.value_width
    inputs = {
        "q": F.normalize(normal(heads, shape.key_width), dim=-1),
        "k": F.normalize(normal(heads, shape.key_width), dim=-1),
        "v": normal(heads, shape.value_width),
        "beta": normal(heads).sigmoid(),
        "log_decay": -0.1 * normal(heads).abs(),
        "channel_decay": -0.1 * normal(heads, shape.key_width).abs(),
        "x": normal(channels),
        "log_a": -0.1 * normal(channels).abs(),
    }
    for name in ("tq", "tk1", "tk2"):
        inputs[name] = F.normalize(normal(heads, shape.tensor_key_width), dim=-1)
    inputs["v2"] = normal(heads, shape.value_width)
    return {name: x.to(shape.device, getattr(torch, shape.dtype)).requires_grad_() for name, x in inputs.items()}


def _ours(operator: str, backend: str, shape: Shape, *tensors: Tensor) -> Tensor:
    window = {"window": shape.window} if operator == "sliding_attention" else {}
    return OPERATORS[operator][0](*tensors, backend=backend, **window)[0]


def _fla(function: Callable, shape: Shape, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    # As flash-linear-attention names them, and Hugging Face after it; the decay is the last.
    *beta, decay = gates
    return function(q, k, v, g=decay, output_final_state=True, **({"beta": beta[0]} if beta else {}))[0]


def _hgrn(function: Callable, shape: Shape, x: Tensor, log_a: Tensor) -> Tensor:
    return function(x, log_a, output_final_state=True)[0]


def _flash(function: Callable, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q, k, v, causal=True, window_size=(shape.window - 1, 0))


def _mamba(function: Callable, shape: Shape, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    # Only the scan itself: with steps dt = -log_decay and A = -1 its decays are ours. 256 is Mamba-2's own chunk.
    minus_one = -torch.ones(shape.heads, device=shape.device)
    return function(v, -log_decay, minus_one, k, q, chunk_size=256, return_final_states=True)[0]


# How many products of a chunk are pairs, states read, pairs times values, updates, and, of gradients alone, those of
# pairs, and of queries and keys from pairs and from states: forward, then forward and backward with states computed
# once more. A triangular solve counts as a full product.
_DELTA = ((2, 2, 2, 1, 0, 0, 0), (4, 4, 5, 4, 2, 4, 3))
_LINEAR = ((1, 1, 1, 1, 0, 0, 0), (2, 2, 2, 3, 1, 2, 2))
PRODUCTS = {"delta_rule": _DELTA, "scalar_decay": _LINEAR, "channel_decay": _LINEAR}

_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllb"
_ROUTINES = {torch.float32: f"{_BRGEMM}PKfS3_Pfb", torch.bfloat16: f"{_BRGEMM}PKN3c108BFloat16ES5_Pfb"}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
# Whether the processor multiplies a dtype with its right operand packed, by the dtype's number in PyTorch.
_COULD_PACK = "_ZN2at6native7cpublas10could_packEN3c1010ScalarTypeE"
_NUMBERS = {torch.float32: 6, torch.bfloat16: 15}

QWEN3_NEXT = "transformers.models.qwen3_next.modeling_qwen3_next"
MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
# Functions of other libraries: operator, name, module, function, and `call(function, shape, *tensors)`. Hugging Face's
# are for a CPU, the others for a GPU.
RIVALS: tuple[tuple[str, str, str, str, Callable[..., Tensor]], ...] = (
    ("delta_rule", "hf_qwen3_next", QWEN3_NEXT, "torch_chunk_gated_delta_rule", _fla),
    ("scalar_decay", "hf_mamba2", MAMBA2, "mamba2_chunk_scan", _mamba),
    ("delta_rule", "fla_gated_delta_rule", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _fla),
    ("scalar_decay", "fla_simple_gla", "fla.ops.simple_gla", "chunk_simple_gla", _fla),
    ("channel_decay", "fla_gla", "fla.ops.gla", "chunk_gla", _fla),
    ("kda", "fla_kda", "fla.ops.kda", "chunk_kda", _fla),
    ("diagonal_scan", "fla_hgrn", "fla.ops.hgrn", "chunk_hgrn", _hgrn),
    ("sliding_attention", "flash_attn", "flash_attn", "flash_attn_func", _flash),
)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def all_contenders(
    shape: Shape, operators: Sequence[str], *, backends: Sequence[str], limit: bool
) -> tuple[dict[str, dict[str, Contender]], dict[str, str]]:
    """By operator: ours first, on the first of `backends`; then, by name, what it is compared with. And why any of
    these is missing.

    Compared with are, with `limit`, the matrix products of the chunked form alone, where it has them and on a CPU;
    other libraries' functions; ours on the other `backends`; and full softmax attention by PyTorch.
    """
    inputs, device = make_inputs(shape), torch.device(shape.device).type
    functions, missing = _rivals(device, operators)
    attention = contender(_sdpa, [inputs[name] for name in ("q", "k", "v")])
    found = {}
    for operator in operators:
        tensors = [inputs[name] for name in OPERATORS[operator][1]]
        ours = {backend: contender(partial(_ours, operator, backend, shape), tensors) for backend in backends}
        own = {operator: ours.pop(backends[0])}
        if limit and operator in PRODUCTS and device == "cpu":
            own[f"{operator} gemm_limit"] = gemm_limit(operator, shape)
        own |= {name: contender(partial(call, shape), tensors) for name, call in functions[operator].items()}
        own |= {f"{operator} {backend}": run for backend, run in ours.items()}
        found[operator] = own | {"sdpa": attention}
    return found, missing


def _rivals(device: str, operators: Sequence[str]) -> tuple[dict[str, dict[str, Callable]], dict[str, str]]:
    found: dict[str, dict[str, Callable]] = {operator: {} for operator in operators}
    missing = {}
    for operator, name, module, attribute, call in RIVALS:
        kind = "cpu" if name.startswith("hf_") else "cuda"
        if operator not in found:
            continue
        if kind != device:
            missing[name] = f"is for {kind}"
            continue
        try:
            found[operator][name] = partial(call, getattr(import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            missing[name] = str(error)
    return found, missing


def gemm_limit(operator: str, shape: Shape) -> Contender:
    """The time in which a processor can make the operator's matrix products and nothing else: those of its chunk form,
    on the chunk's own shapes, with operands in cache, in PyTorch's number of threads.

    By PyTorch's `at::native::cpublas::brgemm` where its library exports it, else by `torch.bmm` over all chunks.
    """
    key, value, dtype = shape.key_width, shape.value_width, getattr(torch, shape.dtype)
    chunk = chunk_length(key, value)
    sizes = [(chunk, chunk, key), (chunk, value, key), (chunk, value, chunk), (key, value, chunk)]
    sizes += [(chunk, chunk, value), (chunk, key, chunk), (chunk, key, value)]
    repeats = -(-shape.tokens * shape.batch // chunk) * shape.heads
    products = [
        [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)] for counts in PRODUCTS[operator]
    ]
    if limit_source(dtype) == "torch.bmm":

        def multiply(backward: bool) -> None:
            for size in products[backward]:
                torch.bmm(*_operands(repeats, *size, dtype))

        return multiply
    arrays = [(ctypes.c_int64 * (3 * len(each)))(*(number for size in each for number in size)) for each in products]
    make = build.library().seqtrain_products
    make.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_bool]
    make_by = partial(make, _address(_ROUTINES[dtype]), _address(_RELEASE))

    def run(backward: bool) -> None:
        make_by(arrays[backward], len(products[backward]), repeats, torch.get_num_threads(), _packs(dtype))

    return run


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


@cache
def _operands(repeats: int, rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(repeats, rows, depth).to(dtype), torch.randn(repeats, depth, columns).to(dtype)
