"""What tools/bench_operators.py times: our operators and their rivals, as closures over shared inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

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
    """`run(*tensors)` gives the output; `tensors` are the inputs a gradient is taken of."""

    name: str
    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def __call__(self, *, backward: bool) -> None:
        if not backward:
            with torch.no_grad():
                self.run(*self.tensors)
            return
        out = self.run(*self.tensors)
        torch.autograd.grad(out, self.tensors, torch.ones_like(out))


@dataclass(frozen=True)
class Limit:
    """The products of an operator alone, forward, and forward and backward."""

    name: str
    forward: Callable[[], object]
    both: Callable[[], object]

    def __call__(self, *, backward: bool) -> None:
        (self.both if backward else self.forward)()


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


# What each operator is given, by the names of `make_inputs`.
ARGUMENTS = {
    "delta_rule": ("q", "k", "v", "beta", "log_decay"),
    "scalar_decay": ("q", "k", "v", "log_decay"),
    "channel_decay": ("q", "k", "v", "channel_decay"),
    "kda": ("q", "k", "v", "beta", "channel_decay"),
    "diagonal_scan": ("x", "log_a"),
    "tensor_attention": ("tq", "tk1", "tk2", "v", "v2"),
    "sliding_attention": ("q", "k", "v"),
}


def ours(
    shape: Shape, inputs: dict[str, Tensor], operators: list[str], backend: str, label: str
) -> dict[str, Contender]:
    """Our operators on a backend, by their names."""
    window = shape.window
    forms: dict[str, Callable[..., Tensor]] = {
        "delta_rule": lambda *x: delta_rule(*x, backend=backend)[0],
        "scalar_decay": lambda *x: linear_attention(*x, backend=backend)[0],
        "channel_decay": lambda *x: linear_attention(*x, backend=backend)[0],
        "kda": lambda *x: delta_rule(*x, backend=backend)[0],
        "diagonal_scan": lambda *x: diagonal_scan(*x, backend=backend)[0],
        "tensor_attention": lambda *x: tensor_attention(*x, backend=backend)[0],
        "sliding_attention": lambda *x: softmax_attention(*x, window=window, backend=backend)[0],
    }
    return {
        name: Contender(name + label, forms[name], tuple(inputs[key] for key in ARGUMENTS[name])) for name in operators
    }


def sdpa(inputs: dict[str, Tensor]) -> Contender:
    """Full softmax attention by PyTorch, the rival of all."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2)

    return Contender("sdpa", run, (inputs["q"], inputs["k"], inputs["v"]))


@dataclass(frozen=True)
class Rival:
    """A function of another library: `call(function, shape, *tensors)` gives its output. `device`: what it is for."""

    operator: str
    name: str
    module: str
    function: str
    call: Callable[..., Tensor]
    device: str = "cpu"


def _mamba(function: Callable, shape: Shape, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    # Only the scan itself: with steps dt = -log_decay and A = -1 its decays are ours. 256 is Mamba-2's own chunk.
    minus_one = -torch.ones(shape.heads, device=shape.device)
    return function(v, -log_decay, minus_one, k, q, chunk_size=256, return_final_states=True)[0]


RIVALS = (
    Rival(
        "delta_rule",
        "hf_qwen3_next",
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_chunk_gated_delta_rule",
        lambda f, _, q, k, v, beta, g: f(q, k, v, g=g, beta=beta, output_final_state=True)[0],
    ),
    Rival("scalar_decay", "hf_mamba2", "transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan", _mamba),
    Rival(
        "delta_rule",
        "fla_gated_delta_rule",
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        lambda f, _, q, k, v, beta, g: f(q, k, v, g=g, beta=beta, output_final_state=True)[0],
        device="cuda",
    ),
    Rival(
        "scalar_decay",
        "fla_simple_gla",
        "fla.ops.simple_gla",
        "chunk_simple_gla",
        lambda f, _, q, k, v, g: f(q, k, v, g=g, output_final_state=True)[0],
        device="cuda",
    ),
    Rival(
        "channel_decay",
        "fla_gla",
        "fla.ops.gla",
        "chunk_gla",
        lambda f, _, q, k, v, g: f(q, k, v, g=g, output_final_state=True)[0],
        device="cuda",
    ),
    Rival(
        "kda",
        "fla_kda",
        "fla.ops.kda",
        "chunk_kda",
        lambda f, _, q, k, v, beta, g: f(q, k, v, g=g, beta=beta, output_final_state=True)[0],
        device="cuda",
    ),
    Rival(
        "diagonal_scan",
        "fla_hgrn",
        "fla.ops.hgrn",
        "chunk_hgrn",
        lambda f, _, x, g: f(x, g, output_final_state=True)[0],
        device="cuda",
    ),
    Rival(
        "sliding_attention",
        "flash_attn",
        "flash_attn",
        "flash_attn_func",
        lambda f, shape, q, k, v: f(q, k, v, causal=True, window_size=(shape.window - 1, 0)),
        device="cuda",
    ),
)


def rivals(
    shape: Shape, inputs: dict[str, Tensor], operators: list[str]
) -> tuple[dict[str, list[Contender | Limit]], dict[str, str]]:
    """Those we are compared with, by operator, and why any is missing."""
    found: dict[str, list[Contender | Limit]] = {name: [] for name in operators}
    missing: dict[str, str] = {}
    for rival in RIVALS:
        if rival.operator not in operators:
            continue
        if rival.device != torch.device(shape.device).type:
            missing[rival.name] = f"is for {rival.device}"
            continue
        try:
            function = getattr(import_module(rival.module), rival.function)
        except (ImportError, AttributeError) as error:
            missing[rival.name] = str(error)
            continue
        tensors = tuple(inputs[key] for key in ARGUMENTS[rival.operator])
        found[rival.operator].append(Contender(rival.name, _bound(rival.call, function, shape), tensors))
    return found, missing


def _bound(call: Callable[..., Tensor], function: Callable, shape: Shape) -> Callable[..., Tensor]:
    return lambda *tensors: call(function, shape, *tensors)


def limits(shape: Shape, operators: list[str]) -> dict[str, Limit]:
    """The time the products alone take on this CPU, for those operators that are products."""
    if torch.device(shape.device).type != "cpu":
        return {}
    found = {}
    for name in operators:
        if name in PRODUCTS:
            forward, both = (
                gemm_limit(
                    name,
                    tokens=shape.tokens * shape.batch,
                    heads=shape.heads,
                    key=shape.key_width,
                    value=shape.value_width,
                    dtype=shape.torch_dtype,
                    backward=backward,
                )
                for backward in (False, True)
            )
            found[name] = Limit(f"{name} gemm_limit", forward, both)
    return found
