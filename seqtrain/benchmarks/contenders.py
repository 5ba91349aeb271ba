"""What the operators' benchmark times: our operators and their rivals, over shared inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.benchmarks.gemm_limit import PRODUCTS, gemm_limit
from seqtrain.kernels import delta_rule, diagonal_scan, linear_attention, softmax_attention, tensor_attention


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

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Contender:
    """One thing to time: a forward pass, and a forward and backward pass."""

    name: str
    forward: Callable[[], object]
    both: Callable[[], object]

    @classmethod
    def of(cls, name: str, run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> "Contender":
        """`run(*tensors)` gives the output; gradients are taken of all of `tensors`."""

        def forward() -> None:
            with torch.no_grad():
                run(*tensors)

        def both() -> None:
            out = run(*tensors)
            torch.autograd.grad(out, tensors, torch.ones_like(out))

        return cls(name, forward, both)


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
    return {name: x.to(shape.device, shape.torch_dtype).requires_grad_() for name, x in inputs.items()}


def ours(shape: Shape, inputs: dict[str, Tensor], operator: str, backend: str, label: str = "") -> Contender:
    """Our operator on a backend; `label` follows its name."""
    function, names = OPERATORS[operator]
    options = {"backend": backend} | ({"window": shape.window} if operator == "sliding_attention" else {})
    return Contender.of(operator + label, lambda *x: function(*x, **options)[0], [inputs[name] for name in names])


def sdpa(inputs: dict[str, Tensor]) -> Contender:
    """Full softmax attention by PyTorch, the rival of all."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2)

    return Contender.of("sdpa", run, [inputs[name] for name in ("q", "k", "v")])


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


QWEN3_NEXT = "transformers.models.qwen3_next.modeling_qwen3_next"
MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
# Functions of other libraries: operator, name, module, function, `call(function, shape, *tensors)`, and its device.
RIVALS: tuple[tuple[str, str, str, str, Callable[..., Tensor], str], ...] = (
    (
        "delta_rule",
        "hf_qwen3_next",
        QWEN3_NEXT,
        "torch_chunk_gated_delta_rule",
        _fla,
        "cpu",
    ),
    ("scalar_decay", "hf_mamba2", MAMBA2, "mamba2_chunk_scan", _mamba, "cpu"),
    ("delta_rule", "fla_gated_delta_rule", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _fla, "cuda"),
    ("scalar_decay", "fla_simple_gla", "fla.ops.simple_gla", "chunk_simple_gla", _fla, "cuda"),
    ("channel_decay", "fla_gla", "fla.ops.gla", "chunk_gla", _fla, "cuda"),
    ("kda", "fla_kda", "fla.ops.kda", "chunk_kda", _fla, "cuda"),
    ("diagonal_scan", "fla_hgrn", "fla.ops.hgrn", "chunk_hgrn", _hgrn, "cuda"),
    ("sliding_attention", "flash_attn", "flash_attn", "flash_attn_func", _flash, "cuda"),
)


def rivals(
    shape: Shape, inputs: dict[str, Tensor], operators: Sequence[str]
) -> tuple[dict[str, list[Contender]], dict[str, str]]:
    """Those we are compared with, by operator, and why any is missing."""
    found: dict[str, list[Contender]] = {name: [] for name in operators}
    missing: dict[str, str] = {}
    for operator, name, module, attribute, call, device in RIVALS:
        if operator not in found:
            continue
        if device != torch.device(shape.device).type:
            missing[name] = f"is for {device}"
            continue
        try:
            function = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            missing[name] = str(error)
            continue
        tensors = [inputs[key] for key in OPERATORS[operator][1]]
        found[operator].append(Contender.of(name, partial(call, function, shape), tensors))
    return found, missing


def limit(shape: Shape, operator: str) -> list[Contender]:
    """The matrix products of the operator's chunked form alone; none on a GPU, or where it has none."""
    if operator not in PRODUCTS or torch.device(shape.device).type != "cpu":
        return []
    make = partial(
        gemm_limit,
        operator,
        tokens=shape.tokens * shape.batch,
        heads=shape.heads,
        key=shape.key_width,
        value=shape.value_width,
        dtype=shape.torch_dtype,
    )
    return [Contender(f"{operator} gemm_limit", make(backward=False), make(backward=True))]
