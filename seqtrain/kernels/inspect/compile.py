"""Compiles Triton kernels for GPUs that are not here, and reads the machine code: registers, spills, instructions.

    with compiling("sm_90") as kernels:
        diagonal_scan(x, log_a, backend="triton")      # CPU tensors; launches are compiled, none runs
    kernels[0].registers, kernels[0].spilled, kernels[0].blocks, kernels[0].faults()

This needs neither a GPU nor a CUDA toolkit: Triton's wheel carries NVIDIA's assembler and disassembler. The code is not
run, so nothing here is a measurement.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seqtrain.kernels import dispatch, gpu
from seqtrain.kernels.inspect.targets import TARGETS, by_name, use_target

# From this many rows on, products of 16-bit matrices are to run on the fastest matrix instructions of a target.
WIDE_ROWS = 64


@dataclass(frozen=True)
class CompiledKernel:
    """One launch as compiled for a target. Sizes are bytes; registers and spills are per thread."""

    kernel: str
    target: str
    grid: tuple[int, ...]
    # Dtypes of tensors, and the values of compile-time arguments, by name.
    arguments: dict[str, str]
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    # Blocks resident on a multiprocessor at a time.
    blocks: int
    # Products of matrices in the source that matrix instructions can do (NVIDIA's can't do those of precise float32),
    # those of them that `WIDE_ROWS` speaks of; matrix and copy instructions.
    dots: int
    wide_dots: int
    matrix: dict[str, int]
    copies: dict[str, int]
    instructions: int

    def faults(self) -> list[str]:
        """What a pinned configuration must not do: spill, exceed shared memory, lose the matrix instructions."""
        target, found = TARGETS[self.target], []
        if self.spilled > target.spill_limit:
            found.append(f"spills {self.spilled} B per thread (at most {target.spill_limit})")
        if self.shared > target.shared_block:
            found.append(f"takes {self.shared} B of shared memory (at most {target.shared_block})")
        if self.wide_dots and not any(name.startswith(target.wide_matrix) for name in self.matrix):
            found.append(f"has no {target.wide_matrix[0]} for its {self.wide_dots} products of matrices")
        elif self.dots and not self.matrix:
            found.append(f"has no matrix instruction for its {self.dots} products of matrices")
        return found


@contextmanager
def compiling(target: str) -> Iterator[list[CompiledKernel]]:
    """Inside, kernels launched with CPU tensors are compiled for a target of `gpu.TARGETS` and collected, not run.

    Operators return uninitialized memory. Raises `RuntimeError` in a process with `TRITON_INTERPRET=1`.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets in this process; start it without TRITON_INTERPRET in the environment")
    kernels: list[CompiledKernel] = []
    stock_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        kernels.append(_examine(self.fn.__name__, compiled, grid(named) if callable(grid) else grid, named, target))

    use_target(target)
    gpu.DEVICES.add("cpu")
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = stock_run
        gpu.DEVICES.discard("cpu")
        dispatch.reset_backend_choice()


def _examine(name: str, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any], target: str) -> CompiledKernel:
    limits = TARGETS[target]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    code = _nvidia(compiled) if limits.backend == "cuda" else _amd(compiled.asm["amdgcn"])
    dots = _dots(compiled.asm["ttir"])
    return CompiledKernel(
        kernel=name,
        target=target,
        grid=tuple(grid),
        arguments={key: _described(x) for key, x in by_name(arguments).items() if x is not None},
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=code.registers,
        spilled=code.spilled,
        shared=shared,
        blocks=limits.blocks(code.registers, shared, warps, code.tensor_columns),
        dots=len(dots),
        wide_dots=sum(rows >= WIDE_ROWS and bits == 16 for rows, bits in dots),
        matrix=_named(code.instructions, limits.wide_matrix + limits.narrow_matrix),
        copies=_named(code.instructions, limits.copies),
        instructions=code.instructions.total(),
    )


@dataclass(frozen=True)
class _Code:
    registers: int
    spilled: int
    instructions: Counter
    tensor_columns: int = 0


def _nvidia(compiled: Any) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump said {usage[:200]!r}"
    # An instruction, after its address and its predicate: HGMMA.64x128x16.F32.BF16
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", listing, re.MULTILINE)
    # Triton's kernels have no arrays of their own: what lies on the stack was spilled.
    return _Code(int(found[1]), int(found[2]), Counter(names), compiled.metadata.tmem_size or 0)


def _amd(assembly: str) -> _Code:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    names = re.findall(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)(.*)", assembly, re.MULTILINE)
    # Loads that go to shared memory by themselves end in "lds"; others are no copies.
    plain = [
        name for name, rest in names if not name.startswith(("buffer_load", "global_load")) or "lds" in rest + name
    ]
    return _Code(figure("vgpr_count"), figure("private_segment_fixed_size"), Counter(plain))


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _dots(ttir: str) -> list[tuple[int, int]]:
    """Rows of the left side and bits of an element, of each product of matrices that is not one of precise float32."""
    shapes = re.findall(r"tt\.dot\b(.*?): tensor<(?:\d+x)*?(\d+)x\d+x[a-z]+(\d+)\S*> \*", ttir)
    return [(int(rows), int(bits)) for options, rows, bits in shapes if bits == "16" or "tf32" in options]


def _named(instructions: Counter, prefixes: tuple[str, ...]) -> dict[str, int]:
    return {name: count for name, count in sorted(instructions.items()) if name.startswith(prefixes)}


def _described(x: Any) -> str:
    x = getattr(x, "base", x) if hasattr(x, "block_shape") else x
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else str(x)
