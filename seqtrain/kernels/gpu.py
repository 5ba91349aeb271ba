"""What Triton backends share: where kernels run, which GPU this is, and how a kernel is launched on it.

A backend is a module `seqtrain.kernels.<operator>.triton` with `run`, `unavailable` (the one below) and `EXAMPLES`:
calls of the public operator, by which `seqtrain.kernels.inspect` finds every kernel that they launch.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from inspect import signature
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqtrain.kernels.documents import boundaries_of

# Device types that kernels are launched on: CUDA only, but for processes that interpret or compile (`inspect`).
DEVICES = {"cuda"}
# The GPUs that configurations are pinned for: NVIDIA's by compute capability, AMD's by name.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Multiprocessors of those that are most common: A100, H100, B200, MI300X.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# How float32 products are computed there in full precision and, where possible, on matrix units.
PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "sm_100": "tf32x3", "gfx942": "ieee"}
INSTALL = "needs Triton (pip install 'seqtrain[gpu]')"
# The first whose `tl.range` has `disable_licm`, without which kernels spill.
OLDEST = (3, 5)

# CUDA 12.8's assembler leaves operand descriptors unset in some kernels for Hopper: the delta rule's gradients are
# wrong, or out-of-bounds memory is read. 13.0 and 13.4 ran correctly; 12.9's machine code has the descriptors set.
PTXAS = (12, 9)


def refuses(device_type: str) -> str | None:
    """Why kernels are not launched on tensors of this device type; None where they are.

    With TRITON_INTERPRET=1 in the environment they are interpreted, and take CPU tensors alone.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from seqtrain.kernels.inspect import interpreter

        try:
            interpreter.install()
        except RuntimeError as error:
            return f"can't be interpreted: {error}"
    if device_type in DEVICES:
        return None
    return "needs a CUDA device" if "cuda" in DEVICES else "needs CPU tensors (TRITON_INTERPRET=1 is set)"


def unavailable() -> str | None:
    """Why Triton kernels can't run here, whatever the device; None where they can."""
    if not importlib.util.find_spec("triton"):
        return INSTALL
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or newer (this is {triton.__version__})"
    return _unsound_assembler()


# Each operator asks, and Triton starts a process to learn a version.
@cache
def _unsound_assembler() -> str | None:
    """Why Triton's assembler can't be trusted for the GPU here; a newer one that Triton brings along is switched to."""
    if torch.version.cuda is None or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    used = get_ptxas(90) if signature(get_ptxas).parameters else get_ptxas()
    if _version(used) >= PTXAS:
        return None
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is not None and _version(newer) >= PTXAS:
        # The one setting that all versions of Triton have, and that child processes inherit.
        os.environ["TRITON_PTXAS_PATH"] = newer.path
        return None
    need = f"needs ptxas {PTXAS[0]}.{PTXAS[1]} or newer on Hopper"
    return f"{need} (Triton's is {used.version}): set TRITON_PTXAS_PATH, or upgrade Triton"


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))


# The widest K of matrix recurrences, which no program cuts: what is wider has no pinned configuration.
WIDEST = 256


def serves(inputs: Sequence[Any], *_: Any) -> bool:
    """Whether the kernels of matrix recurrences take q or k `[B,T,H,K]`: float64 only in Triton's interpreter."""
    x = inputs[1] if inputs[0] is None else inputs[0]
    return x.shape[3] <= WIDEST and (x.dtype != torch.float64 or not x.is_cuda)


def target() -> str:
    """The one of `TARGETS` whose configurations suit the GPU that Triton compiles for."""
    from triton.runtime.driver import driver

    active = driver.active.get_current_target()
    if active.backend != "cuda":
        return "gfx942"
    return "sm_100" if active.arch >= 100 else "sm_90" if active.arch >= 90 else "sm_80"


class Machine(NamedTuple):
    """The GPU of a call: one of `TARGETS`, and its multiprocessors (AMD: compute units)."""

    target: str
    multiprocessors: int


def machine_of(x: Tensor) -> Machine:
    """The GPU that `x` is on or, of a CPU tensor, the one that is interpreted or compiled for."""
    return _machine(x.device) if x.is_cuda else Machine(target(), MULTIPROCESSORS[target()])


@cache
def _machine(device: torch.device) -> Machine:
    with torch.cuda.device(device):
        return Machine(target(), torch.cuda.get_device_properties(device).multi_processor_count)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of an accumulator's dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which launches go to the GPU of `x`."""
    # Which of them is current is told in a tenth of the time that making one so takes.
    elsewhere = x.is_cuda and torch.cuda.current_device() != x.device.index
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def boundaries(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Where the documents of `x: [B,T,...]` begin among its B T tokens, and their end; else its rows."""
    if cu_seqlens is None:
        return tuple(row * x.shape[1] for row in range(x.shape[0] + 1))
    return boundaries_of(cu_seqlens)


# A training step has one set of boundaries in all its layers, forward and backward; evaluation adds a few.
@lru_cache(maxsize=16)
def boundaries_tensor(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """`boundaries` on the device, int32."""
    with torch.inference_mode(False):
        return torch.tensor(boundaries, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def pieces(boundaries: tuple[int, ...], length: int, device: torch.device, *, past: int = 0) -> Tensor:
    """Documents split into pieces of at most `length` tokens, a document's pieces consecutive: int32 `[P,5]`.

    A row: the document, the piece's first row, the row after its last, and the document's first and last piece. The
    first begins `past` rows early, at the past inputs of the document; without these an empty document has no piece.
    """
    rows: list[tuple[int, ...]] = []
    for document, (start, end) in enumerate(pairwise(boundaries)):
        if start - past == end:
            continue
        edges = [start - past, *range(start + length, end, length), end]
        first, last = len(rows), len(rows) + len(edges) - 2
        rows += [(document, *piece, first, last) for piece in pairwise(edges)]
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    with torch.inference_mode(False):
        return table.to(device)


# Programs that fill a GPU: two on each multiprocessor of the larger ones.
PROGRAMS = 264


def piece_length(boundaries: tuple[int, ...], blocks: int, shortest: int) -> int:
    """Tokens per piece, so that pieces times `blocks` of channels fill a GPU where documents are long enough."""
    return max(shortest, -(-boundaries[-1] // max(1, -(-PROGRAMS // blocks))))


class Constants(SimpleNamespace):
    """A kernel's compile-time arguments, which it takes as one: sizes of tensors and blocks, flags, dtypes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(vars(self).values()))


@dataclass(frozen=True)
class Launch:
    """A pinned configuration: what a kernel is launched with next to its tensors.

    sizes: block sizes and whatever else depends on the GPU, by constexpr name.
    """

    warps: int = 4
    # Loop iterations whose loads are in flight at a time.
    stages: int = 2
    sizes: Mapping[str, int] = field(default_factory=dict)

    def options(self, **constants: Any) -> dict[str, Any]:
        """Keyword arguments of the launch; fusing a*b+c is explicit, since its default changes between Tritons."""
        constants = {"M": Constants(**self.sizes, **constants)}
        return {**constants, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class BoundKernel:
    """A kernel with its number of programs and compile-time arguments: called with the other arguments, it is launched.

    For each launch Triton looks at every argument, to find the compiled kernel; here at dtypes and alignment alone,
    which is all that it tells tensors and floats apart by. Others, integers above all, belong among the options.
    """

    def __init__(self, kernel: Any, programs: int, options: dict[str, Any]):
        self.kernel, self.grid, self.options = kernel, (programs, 1, 1), options
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any) -> None:
        if not self.grid[0]:
            return
        key = _kinds(arguments)
        found = self._compiled.get(key)
        if found is not None:
            found[self.grid](*arguments, self.options["M"])
            return
        found = self.kernel[self.grid](*arguments, **self.options)
        # Nothing is compiled where kernels are interpreted, and nothing to be launched where they are examined.
        if found is not None:
            self._compiled[key] = found


def _kinds(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What distinguishes a launch from others: of tensors dtype and alignment, in tuples of them, too."""
    found: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found += (x.dtype, x.data_ptr() & 15)
        else:
            found.append(_kinds(x) if isinstance(x, tuple) else type(x))
    return tuple(found)
