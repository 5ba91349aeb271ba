"""Pinned configurations of the kernels of matrix recurrences, chosen by what they compile to: no spills, then tiles.

Those of sm_90 are the fastest without spills of some hundred timed on an H100 (bfloat16, K=V=128, 16 heads of 32,768
tokens, Triton 3.6 and 3.9); narrow blocks of V make more programs, of which `forward` and `reverse` have few. What
holds for float32, for K beyond 128 and for other GPUs was compiled by Triton 3.9, and timed nowhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from seqtrain.kernels.gpu import Launch

# The longest chunk of any GPU and dtype.
LONGEST = 64

# By kernel; those that find pairs of tokens do other work with a decay per channel, and more of it for the delta rule.
# BK: the most.
_PREPARE = Launch(warps=4, stages=1, sizes={"BK": 32})
_COMMON = {
    "prepare": _PREPARE,
    "prepare channel": _PREPARE,
    "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
    "carry": Launch(warps=4, stages=1, sizes={"BV": 16}),
}
# What differs on a target.
_PINNED = {
    "sm_80": {
        "forward": Launch(warps=4, stages=2, sizes={"BV": 16, "AHEAD": 0}),
        "reverse": Launch(warps=4, stages=2, sizes={"BV": 16, "AHEAD": 0}),
        "gradients": Launch(warps=4, stages=1, sizes={"BK": 32, "BV": 32}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 16, "BV": 32}),
    },
    "sm_90": {
        "prepare": Launch(warps=4, stages=2, sizes={"BK": 64}),
        "prepare channel": Launch(warps=4, stages=1, sizes={"BK": 64}),
        "prepare channel torch.float16": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "prepare channel delta": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        "reverse": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        # Of documents that are cut there are programs enough: wide blocks read keys and inverses fewer times.
        "forward cut": Launch(warps=4, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "reverse cut": Launch(warps=4, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "gradients": Launch(warps=4, stages=3, sizes={"BK": 32, "BV": 64}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 32, "BV": 64}),
        "gradients channel delta": Launch(warps=8, stages=1, sizes={"BK": 32, "BV": 64}),
    },
    "sm_100": {
        "prepare": Launch(warps=4, stages=2, sizes={"BK": 64}),
        "prepare channel": Launch(warps=8, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "reverse": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "gradients": Launch(warps=8, stages=2, sizes={"BK": 32, "BV": 64}),
        "gradients channel": Launch(warps=8, stages=1, sizes={"BK": 16, "BV": 64}),
    },
    "gfx942": {
        "forward": Launch(warps=4, stages=1, sizes={"BV": 32, "AHEAD": 0}),
        "reverse": Launch(warps=4, stages=1, sizes={"BV": 32, "AHEAD": 0}),
        "gradients": Launch(warps=4, stages=1, sizes={"BK": 64, "BV": 32}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 16, "BV": 64}),
    },
}

# Of float32, for all targets: its products take about three times the registers of 16 bits.
_FLOAT32 = {
    "forward": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
    "reverse": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
    "gradients": Launch(warps=8, stages=1, sizes={"BK": 32, "BV": 16}),
}


def chunk_length(target: str, dtype: torch.dtype) -> int:
    """Tokens a chunk (BT of the kernels) on `target`, for q and k of this dtype: at most LONGEST."""
    # Operands that lie in registers spill if they are longer: all of sm_80, and on every target those of float32.
    if dtype == torch.float32:
        return 16
    return 32 if target == "sm_80" else LONGEST


@dataclass(frozen=True)
class _Case:
    """What a configuration is chosen by; `width`: K, rounded up to a power of two of at least 16."""

    target: str
    kernel: str
    width: int
    dtype: torch.dtype
    decay: int
    delta: bool

    @property
    def wide(self) -> bool:
        return self.width > 128

    @property
    def float32(self) -> bool:
        return self.dtype == torch.float32


# In turn: kernels, the cases in which other numbers hold for them, and these: warps, stages, and constexprs.
_CHANGES: tuple[tuple[str, Callable[[_Case], bool], dict[str, int]], ...] = (
    # Operands of more chunks in flight are more than shared memory holds, and more than four warps' registers.
    ("forward reverse maps step", lambda x: x.wide, {"warps": 8, "stages": 1, "BV": 16}),
    ("forward reverse maps step", lambda x: x.target == "sm_80" or (x.float32 and x.width == 32), {"BV": 16}),
    # The state as one operand is 256 registers of each thread. Two parts or four: what spills on no target.
    ("forward reverse maps", lambda x: x.wide and x.float32, {"PARTS": 2}),
    ("forward maps", lambda x: x.wide and x.float32 and (x.decay == 1 or (x.decay == 0 and x.delta)), {"PARTS": 4}),
    ("prepare", lambda x: x.float32 and x.width == 16, {"warps": 2}),
    # Addresses of loads in flight spill.
    ("gradients", lambda x: x.wide and not x.float32 and x.target == "sm_90" and x.decay < 2, {"stages": 1}),
    ("gradients", lambda x: x.wide and not x.float32 and x.target == "gfx942" and x.decay == 2, {"BV": 32}),
    (
        "gradients",
        lambda x: x.wide and not x.float32 and x.target == "sm_90" and x.decay == 2 and not x.delta,
        {"BV": 32},
    ),
    # A thread has 512 registers there, but 256 if there are eight warps.
    ("forward reverse maps carry step prepare gradients", lambda x: x.target == "gfx942", {"warps": 4}),
)


@cache
def pinned(
    target: str, kernel: str, key_width: int, dtype: torch.dtype, decay: int, *, delta: bool, cut: bool = False
) -> Launch:
    """How `kernel` is launched on `target` (one of `gpu.TARGETS`).

    key_width: K, rounded up to a power of two of at least 16; dtype: of q and k; decay: DECAY; delta: for delta rules;
    cut: where documents are.
    """
    case = _Case(target, kernel, key_width, dtype, decay, delta)
    rows = _COMMON | (_FLOAT32 if case.float32 else _PINNED[target])
    base = "reverse" if kernel == "maps" else kernel
    names = [base, f"{base} cut", f"{base} channel", f"{kernel} channel {case.dtype}", f"{kernel} channel delta"]
    allowed = [True, cut, decay == 2, decay == 2, decay == 2 and delta]
    launch = [rows[name] for name, holds in zip(names, allowed, strict=True) if holds and name in rows][-1]
    numbers = {"PARTS": 1} if kernel in ("forward", "reverse", "maps") else {}
    # Kernels that hold a state have all of K in one program.
    numbers |= {**launch.sizes, "BK": min(launch.sizes.get("BK", key_width), key_width)}
    if kernel == "gradients":
        # V is taken to be as wide as K. A loop of one turn dissolves in the one around it, which then spills.
        half = max(16, key_width // 2)
        numbers |= {"BV": min(numbers["BV"], half), "BK": min(numbers["BK"], half if decay == 2 else key_width)}
    if kernel != "step":
        numbers["BT"] = chunk_length(target, dtype)
    if kernel == "carry":
        # Tiles of a transition and of the state.
        numbers["PARTS"] = max(1, key_width // 64)
    numbers |= {"warps": launch.warps, "stages": launch.stages}
    for kernels, applies, changes in _CHANGES:
        if kernel in kernels.split() and applies(case):
            numbers |= changes
    return Launch(warps=numbers.pop("warps"), stages=numbers.pop("stages"), sizes=numbers)


# Blocks that a multiprocessor holds at a time, of `forward` and `reverse` with wide blocks of V.
_RESIDENT = 2
# Chunks: of the shortest piece, and as many as two more launches take the time of.
_SHORTEST, _COST = 8, 4


def piece_chunks(lengths: Sequence[int], narrow: int, wide: int, multiprocessors: int, *, delta: bool) -> int:
    """Chunks of a piece, so that pieces fill a GPU; 0 where documents are better left whole.

    lengths: chunks of each document; narrow, wide: programs of a document, and of a piece of it.

    A program takes about as long for a chunk whatever its width, being a chain of dependent products, so what counts is
    how many chunks follow each other: those of a piece; again as many for maps, or half of that where they have only V
    columns (more of their programs fit at a time); and a product for each piece of the longest document.
    """
    longest, slots = max(lengths, default=0), _RESIDENT * multiprocessors
    whole = max(longest, sum(lengths) * narrow / slots)
    length = max(_SHORTEST, -(-sum(lengths) // max(1, slots // wide)))
    cut = (2 if delta else 1.5) * length + longest / length + _COST
    # What was estimated, not measured, must promise a quarter.
    return length if cut < 0.75 * whole else 0
