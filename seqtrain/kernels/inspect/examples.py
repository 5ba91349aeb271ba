"""Example calls of operators, by which every Triton kernel is compiled for a target and its bytes and FLOPs counted.

A backend `seqtrain.kernels.<operator>.triton` lists its own, and is found by having them:

    EXAMPLES = (Example("scan, bfloat16", diagonal_scan, {"x": ("B T D", "bfloat16"), ...}, {"B": 1, "D": 512}),)

The kernels that a call launches, forward and backward, are found by making it. So a kernel's signature and its pinned
configurations stand in one place, where it is launched.
"""

import importlib
import importlib.util
import json
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import seqtrain.kernels
from seqtrain.kernels.inspect.targets import use_target


@dataclass(frozen=True)
class Example:
    """A call of an operator: `operator(**tensors, **options, backend="triton")`.

    `tensors`: shape in letters and dtype of each. `sizes`: what the letters stand for, T (tokens) aside, which whoever
    makes the call chooses; B T tokens are what bytes and FLOPs are divided by. The floor counts each of `tensors` and
    the first output once: forward, inputs are read and the output written; backward, inputs and the output's gradient
    are read and the inputs' gradients written. Shapes without T (weights, states) count nothing.
    """

    name: str
    operator: Callable[..., Any]
    tensors: Mapping[str, tuple[str, str]]
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    # The two numbers of tokens that counts are the difference of; kernels are compiled as for the larger one.
    tokens: tuple[int, int] = (128, 256)

    def inputs(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """CPU tensors that ask for gradients: normal numbers, `log_*` at most 0, `k` of norm 1; integers 0."""
        generator = torch.Generator().manual_seed(seed)
        letters = {**self.sizes, "T": tokens}
        tensors = {}
        for name, (shape, dtype) in self.tensors.items():
            x = torch.randn([letters[letter] for letter in shape.split()], generator=generator)
            x = -x.abs() if name.startswith("log_") else x
            x = F.normalize(x, dim=-1) if name == "k" else x
            kind = getattr(torch, dtype)
            real = kind.is_floating_point or kind.is_complex
            tensors[name] = x.to(kind).requires_grad_() if real else torch.zeros_like(x, dtype=kind)
        return tensors

    def call(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the operator returns, tensors only."""
        result = self.operator(**tensors, **self.options, backend="triton")
        return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor))

    def floor(self, outputs: tuple[Tensor, ...], tokens: int) -> tuple[float, float]:
        """Bytes per token that must be moved, forward and backward, given what `call` returned for `tokens` tokens."""
        batch = self.sizes["B"]
        letters = {**self.sizes, "T": 1}
        read = 0.0
        for shape, dtype in self.tensors.values():
            if "T" in shape.split():
                count = math.prod(letters[letter] for letter in shape.split())
                read += count * getattr(torch, dtype).itemsize / batch
        written = outputs[0].nbytes / (batch * tokens)
        return read + written, 2 * read + written


# Widths and dtypes of `recurrence_examples`: the most common first, then narrow heads, then wide operands.
_RECURRENCES = (
    (128, "bfloat16"),
    (64, "float16"),
    (32, "bfloat16"),
    (32, "float32"),
    (16, "bfloat16"),
    (256, "bfloat16"),
    (128, "float32"),
    (256, "float32"),
)


def recurrence_examples(operator: Callable[..., Any], *, beta: bool) -> tuple[Example, ...]:
    """Calls of linear attention, or the delta rule (`beta`): without decay, with per-token and per-channel decay."""
    shapes = {"q": "B T H K", "k": "B T H K", "v": "B T H V"} | ({"beta": "B T H"} if beta else {})
    decays = {
        "no decay": {},
        "decay [B,T,H]": {"log_decay": ("B T H", "float32")},
        "decay [B,T,H,K]": {"log_decay": ("B T H K", "float32")},
    }
    rows = tuple(
        Example(
            f"{operator.__name__} {name} K=V={width} {dtype}",
            operator,
            {x: (shape, dtype) for x, shape in shapes.items()} | decay,
            {"B": 1, "H": 1, "K": width, "V": width},
            tokens=(64, 128),
        )
        for width, dtype in _RECURRENCES
        for name, decay in decays.items()
    )
    # So long that they are cut into pieces.
    cut = (replace(x, name=f"long row of {x.name}", tokens=(4096, 8192)) for x in rows if x.sizes["K"] == 128)
    return (*rows, *cut)


def find_examples() -> dict[str, Example]:
    """All examples by name. Raises `ValueError` where two have one name."""
    found: dict[str, Example] = {}
    for package in pkgutil.iter_modules(seqtrain.kernels.__path__, "seqtrain.kernels."):
        if not package.ispkg or not importlib.util.find_spec(f"{package.name}.triton"):
            continue
        module = importlib.import_module(f"{package.name}.triton")
        for example in module.EXAMPLES:
            if example.name in found:
                raise ValueError(f"{package.name}.triton: a second example is called {example.name!r}")
            found[example.name] = example
    return found


@dataclass(frozen=True)
class Count:
    """One direction of an example, per token: bytes moved, their lower bound, FLOPs of products; and launches."""

    example: str
    direction: str
    launches: int
    kernels: tuple[str, ...]
    bytes: float
    floor: float
    flops: float


def compile_example(name: str, target: str) -> list[dict]:
    """`CompiledKernel`s, with their `faults`, of every launch of an example, each configuration once."""
    from seqtrain.kernels.inspect.compile import compiling

    example = find_examples()[name]
    with compiling(target) as kernels:
        inputs = example.inputs(max(example.tokens))
        _backward(inputs, example.call(inputs))
    rows = [{"example": name, **asdict(kernel), "faults": kernel.faults()} for kernel in kernels]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def count_example(name: str, target: str = "sm_90") -> list[Count]:
    """Both directions of an example. In a process that interprets."""
    from seqtrain.kernels.inspect.interpreter import LaunchRecord, install, recording

    install()
    use_target(target)
    example = find_examples()[name]
    launches: dict[tuple[int, str], list[LaunchRecord]] = {}
    floors = (0.0, 0.0)
    short, long = example.tokens
    for tokens in example.tokens:
        with recording() as forward:
            inputs = example.inputs(tokens)
            outputs = example.call(inputs)
        with recording() as backward:
            _backward(inputs, outputs)
        launches[tokens, "forward"], launches[tokens, "backward"] = forward, backward
        floors = example.floor(outputs, tokens)
    # Their difference leaves out what does not grow with the tokens.
    per = example.sizes["B"] * (long - short)
    counts = []
    for direction, floor in zip(("forward", "backward"), floors, strict=True):
        few, many = launches[short, direction], launches[long, direction]
        counts.append(
            Count(
                example=name,
                direction=direction,
                launches=len(many),
                kernels=tuple(launch.kernel for launch in many),
                bytes=(sum(x.bytes for x in many) - sum(x.bytes for x in few)) / per,
                floor=floor,
                flops=(sum(x.dot_flops for x in many) - sum(x.dot_flops for x in few)) / per,
            )
        )
    return counts


def count_in_child(name: str) -> list[dict]:
    """`count_example`, as plain values, in a process of its own that interprets. Raises `RuntimeError` with what went
    wrong."""
    code = (
        "import json, sys; from dataclasses import asdict; from seqtrain.kernels.inspect.examples import count_example;"
        "print(json.dumps([asdict(x) for x in count_example(sys.argv[1])]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"counting failed: {done.stderr.strip().splitlines()[-1]}")
    found: list[dict] = json.loads(done.stdout)
    return found


def _backward(inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> None:
    wanted, leaves = ([x for x in tensors if x.requires_grad] for tensors in (outputs, inputs.values()))
    torch.autograd.grad(wanted, leaves, [torch.ones_like(x) for x in wanted], allow_unused=True)
