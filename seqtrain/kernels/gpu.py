"""What Triton backends share: which GPU this is, how a kernel is launched on it, and example calls to examine it by.

A backend is a module `seqtrain.kernels.<operator>.triton` with `run`, `unavailable` (the one below) and

    EXAMPLES = (Example("scan, bfloat16", diagonal_scan, {"x": ("B T D", "bfloat16"), ...}, {"B": 1, "D": 512}),)

An example is a call of the public operator. Every kernel that call launches, forward and backward, is found by making
it: `seqtrain.analysis` compiles those launches for each target without running them, and runs them in Triton's
interpreter to count what they move and compute. So a kernel's signature and its pinned configurations stand in one
place, where it is launched.

Kernels have run on an H100 (tests/gpu), and those of the matrix recurrences have been timed there; for other GPUs what
stands behind them is the interpreter and what they compile to.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# The GPUs that configurations are pinned for: NVIDIA's by compute capability, AMD's by name.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# How products of float32 are computed there with float32's precision and, where that can be, on matrix units.
PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "sm_100": "tf32x3", "gfx942": "ieee"}
INSTALL = "needs Triton (pip install 'seqtrain[gpu]')"
# The first whose `tl.range` has `disable_licm`, without which kernels spill.
OLDEST = (3, 5)

# CUDA 12.8's assembler leaves descriptors of operands unset in some kernels for Hopper: the delta rule's gradients come
# out wrong, or memory is read that is nobody's. 13.0's and 13.4's ran right; 12.9's machine code shows no such thing.
PTXAS = (12, 9)


def unavailable() -> str | None:
    """Why Triton kernels can't run here, beyond the device; None where they can."""
    if not importlib.util.find_spec("triton"):
        return INSTALL
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or newer (this is {triton.__version__})"
    return _unsound_assembler()


# Each operator asks, and Triton starts a process to learn a version.
@cache
def _unsound_assembler() -> str | None:
    """Why what Triton compiles for the GPU here can't be trusted; where it brings a newer assembler, that is taken."""
    if torch.version.cuda is None or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    used = get_ptxas(90) if signature(get_ptxas).parameters else get_ptxas()
    if _version(used) >= PTXAS:
        return None
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is not None and _version(newer) >= PTXAS:
        # The one way to it that all versions of Triton have, and that processes inherit.
        os.environ["TRITON_PTXAS_PATH"] = newer.path
        return None
    need = f"needs ptxas {PTXAS[0]}.{PTXAS[1]} or newer on Hopper"
    return f"{need} (Triton's is {used.version}): set TRITON_PTXAS_PATH, or upgrade Triton"


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))


def target() -> str:
    """The one of `TARGETS` whose configurations suit the GPU that Triton compiles for."""
    from triton.runtime.driver import driver

    active = driver.active.get_current_target()
    if active.backend != "cuda":
        return "gfx942"
    return "sm_100" if active.arch >= 100 else "sm_90" if active.arch >= 90 else "sm_80"


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype, for the dtype of a kernel's sums."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which launches go to the GPU of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def boundaries(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Where the documents of `x: [B,T,...]` begin among its B T tokens, and their end; else its rows."""
    if cu_seqlens is None:
        return tuple(row * x.shape[1] for row in range(x.shape[0] + 1))
    return tuple(cu_seqlens.tolist())


# A training step meets one set of boundaries in all its layers, forward and backward; a few more for evaluation.
@lru_cache(maxsize=16)
def boundaries_tensor(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """`boundaries` where kernels read them, int32."""
    with torch.inference_mode(False):
        return torch.tensor(boundaries, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def pieces(boundaries: tuple[int, ...], length: int, device: torch.device, *, past: int = 0) -> Tensor:
    """Documents cut into pieces of at most `length` tokens, a document's pieces side by side: int32 `[P,5]`.

    A row: the document, the piece's first row, the row behind its last, and the document's first and last piece. The
    first begins `past` rows early, at inputs the document was given; without any an empty document has no piece.
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
    """Tokens of a piece, so that pieces times `blocks` of channels fill a GPU where documents are long enough."""
    return max(shortest, -(-boundaries[-1] // max(1, -(-PROGRAMS // blocks))))


@dataclass(frozen=True)
class Launch:
    """A pinned configuration: what is handed to a kernel beside its tensors.

    `sizes`: its blocks, and what else the GPU decides, by constexpr name.
    """

    warps: int = 4
    # Iterations of a loop whose loads are in flight at one time.
    stages: int = 2
    sizes: Mapping[str, int] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch. Fusing a*b+c into one step is named, for its default changes in Triton."""
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


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
        """CPU tensors for the call: normal numbers (at most 0 in `log_*`) that ask for gradients; integers 0."""
        generator = torch.Generator().manual_seed(seed)
        letters = {**self.sizes, "T": tokens}
        tensors = {}
        for name, (shape, dtype) in self.tensors.items():
            x = torch.randn([letters[letter] for letter in shape.split()], generator=generator)
            x = -x.abs() if name.startswith("log_") else x
            kind = getattr(torch, dtype)
            real = kind.is_floating_point or kind.is_complex
            tensors[name] = x.to(kind).requires_grad_() if real else torch.zeros_like(x, dtype=kind)
        return tensors

    def call(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the operator returns, tensors only."""
        result = self.operator(**tensors, **self.options, backend="triton")
        return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor))

    def floor(self, outputs: tuple[Tensor, ...], tokens: int) -> tuple[float, float]:
        """Bytes a token that must be moved, forward and backward, given what `call` returned for `tokens` tokens."""
        batch = self.sizes["B"]
        letters = {**self.sizes, "T": 1}
        read = 0.0
        for shape, dtype in self.tensors.values():
            if "T" in shape.split():
                read += torch.Size([letters[letter] for letter in shape.split()]).numel() * _bytes(dtype) / batch
        written = outputs[0].nbytes / (batch * tokens)
        return read + written, 2 * read + written


# Widths and dtypes of `recurrence_examples`: what is trained most, then narrow heads, and those of wide operands.
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
    """Calls of linear attention, or the delta rule (`beta`): without a decay, with one a token, with one a channel."""
    shapes = {"q": "B T H K", "k": "B T H K", "v": "B T H V"} | ({"beta": "B T H"} if beta else {})
    decays = {
        "no decay": {},
        "decay [B,T,H]": {"log_decay": ("B T H", "float32")},
        "decay [B,T,H,K]": {"log_decay": ("B T H K", "float32")},
    }
    return tuple(
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


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
