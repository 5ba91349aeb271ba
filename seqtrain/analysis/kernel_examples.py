"""Every Triton kernel by the examples its backend gives: compiled for a target, and its bytes and FLOPs counted.

The examples of `seqtrain.kernels.<operator>.triton` are found by looking, so a new kernel joins by its `EXAMPLES`.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import seqtrain.kernels
from seqtrain.kernels.gpu import Example


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
    """One direction of an example, a token: bytes moved, the least that could be, FLOPs of products; and launches."""

    example: str
    direction: str
    launches: int
    kernels: tuple[str, ...]
    bytes: float
    floor: float
    flops: float


def compile_example(name: str, target: str) -> list[dict]:
    """`CompiledKernel`s, with their `faults`, of every launch of an example, each configuration once."""
    from seqtrain.analysis.triton_compile import compiling

    example = find_examples()[name]
    with compiling(target) as kernels:
        _forward_and_backward(example, example.inputs(max(example.tokens)))
    rows = [{"example": name, **asdict(kernel), "faults": kernel.faults()} for kernel in kernels]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def count_example(name: str, target: str = "sm_90") -> list[Count]:
    """Both directions of an example. In a process that interprets."""
    from seqtrain.analysis.triton_interpreter import LaunchRecord, install, recording

    install(target)
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


def count_in_child(names: Sequence[str]) -> list[Count]:
    """`count_example` of each, in a process of its own that interprets. Raises `RuntimeError` with what went wrong."""
    code = (
        "import json, sys; from dataclasses import asdict; from seqtrain.analysis.kernel_examples import count_example;"
        "print(json.dumps([asdict(x) for name in json.loads(sys.argv[1]) for x in count_example(name)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(names))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"counting failed: {done.stderr.strip().splitlines()[-1]}")
    return [Count(**{**each, "kernels": tuple(each["kernels"])}) for each in json.loads(done.stdout)]


def _forward_and_backward(example: Example, inputs: dict[str, Tensor]) -> None:
    _backward(inputs, example.call(inputs))


def _backward(inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> None:
    wanted, leaves = ([x for x in tensors if x.requires_grad] for tensors in (outputs, inputs.values()))
    torch.autograd.grad(wanted, leaves, [torch.ones_like(x) for x in wanted], allow_unused=True)
