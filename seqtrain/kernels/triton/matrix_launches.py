"""Pinned configurations of the kernels of matrix recurrences, chosen by what they compile to: no spills, then tiles.

Those of sm_90 are the fastest without spills of some hundred timed on an H100 (bfloat16, K=V=128, 16 heads of 32,768
tokens, Triton 3.6 and 3.9); narrow blocks of V make more programs, of which `forward` and `reverse` have few. What
holds for float32, for K beyond 128 and for other GPUs was compiled by Triton 3.9, and timed nowhere.
"""

from dataclasses import replace
from functools import cache

import torch

from seqtrain.kernels.gpu import Launch

# The longest chunk of any GPU and dtype.
LONGEST = 64

# By target and kernel; those that find pairs of tokens do other work with a decay per channel, and more of it for the
# delta rule. BK: the most.
_PINNED = {
    "sm_80": {
        "prepare": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "prepare channel": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=2, sizes={"BV": 16, "AHEAD": 0}),
        "reverse": Launch(warps=4, stages=2, sizes={"BV": 16, "AHEAD": 0}),
        "gradients": Launch(warps=4, stages=1, sizes={"BK": 32, "BV": 32}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 16, "BV": 32}),
        "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
    },
    "sm_90": {
        "prepare": Launch(warps=4, stages=2, sizes={"BK": 64}),
        "prepare channel": Launch(warps=4, stages=1, sizes={"BK": 64}),
        "prepare channel float16": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "prepare channel delta": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        "reverse": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        "gradients": Launch(warps=4, stages=3, sizes={"BK": 32, "BV": 64}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 32, "BV": 64}),
        "gradients channel delta": Launch(warps=8, stages=1, sizes={"BK": 32, "BV": 64}),
        "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
    },
    "sm_100": {
        "prepare": Launch(warps=4, stages=2, sizes={"BK": 64}),
        "prepare channel": Launch(warps=8, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "reverse": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
        "gradients": Launch(warps=8, stages=2, sizes={"BK": 32, "BV": 64}),
        "gradients channel": Launch(warps=8, stages=1, sizes={"BK": 16, "BV": 64}),
        "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
    },
    "gfx942": {
        "prepare": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "prepare channel": Launch(warps=4, stages=1, sizes={"BK": 32}),
        "forward": Launch(warps=4, stages=1, sizes={"BV": 32, "AHEAD": 0}),
        "reverse": Launch(warps=4, stages=1, sizes={"BV": 32, "AHEAD": 0}),
        "gradients": Launch(warps=4, stages=1, sizes={"BK": 64, "BV": 32}),
        "gradients channel": Launch(warps=4, stages=1, sizes={"BK": 16, "BV": 64}),
        "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
    },
}

# Of float32, for all targets: its products take about three times the registers of 16 bits.
_FLOAT32 = {
    "prepare": Launch(warps=4, stages=1, sizes={"BK": 32}),
    "forward": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
    "reverse": Launch(warps=8, stages=2, sizes={"BV": 32, "AHEAD": 0}),
    "gradients": Launch(warps=8, stages=1, sizes={"BK": 32, "BV": 16}),
    "step": Launch(warps=4, stages=1, sizes={"BV": 16}),
}


def chunk_length(target: str, dtype: torch.dtype) -> int:
    """Tokens a chunk (BT of the kernels) on `target`, for q and k of this dtype: at most LONGEST."""
    # Operands that lie in registers spill if they are longer: all of sm_80, and on every target those of float32.
    if dtype == torch.float32:
        return 16
    return 32 if target == "sm_80" else LONGEST


@cache
def pinned(target: str, kernel: str, key_width: int, dtype: torch.dtype, decay: int, *, delta: bool) -> Launch:
    """How `kernel` is launched on `target` (one of `gpu.TARGETS`).

    key_width: K, rounded up to a power of two of at least 16; dtype: of q and k; decay: DECAY; delta: for delta rules.
    """
    rows = _FLOAT32 if dtype == torch.float32 else _PINNED[target]
    launch = rows[kernel]
    if decay == 2:
        launch = rows.get(f"{kernel} channel", launch)
        launch = rows.get(f"{kernel} channel float16", launch) if dtype == torch.float16 else launch
        launch = rows.get(f"{kernel} channel delta", launch) if delta else launch
    sizes = dict(launch.sizes)
    if kernel in ("forward", "reverse", "step"):
        # All of K is in one program.
        sizes["BK"] = key_width
        if key_width > 128:
            # Operands of more chunks in flight are more than shared memory holds, and more than four warps' registers.
            launch = replace(launch, warps=8, stages=1)
        if kernel != "step":
            sizes["PARTS"] = 1
        if kernel != "step" and key_width > 128 and dtype == torch.float32:
            # The state as one operand is 256 registers of each thread. Two parts or four: what spills on no target.
            sizes["PARTS"] = 4 if kernel == "forward" and (decay == 1 or (decay == 0 and delta)) else 2
        if key_width > 128 or target == "sm_80" or (dtype == torch.float32 and key_width == 32):
            sizes["BV"] = 16
    else:
        sizes["BK"] = min(sizes["BK"], key_width)
    if kernel == "prepare" and dtype == torch.float32 and key_width == 16:
        launch = replace(launch, warps=2)
    if kernel == "gradients":
        # V is taken to be as wide as K. A loop of one turn dissolves in the one around it, which then spills.
        half = max(16, key_width // 2)
        sizes["BV"] = min(sizes["BV"], half)
        if decay == 2:
            sizes["BK"] = min(sizes["BK"], half)
        if key_width > 128 and launch.warps == 4:
            # Addresses of loads in flight spill.
            launch = replace(launch, stages=1)
            if decay == 2:
                sizes["BV"] = min(sizes["BV"], 32)
    if target == "gfx942":
        # A thread has 512 registers there, but 256 where there are eight warps.
        launch = replace(launch, warps=4)
    if kernel != "step":
        sizes["BT"] = chunk_length(target, dtype)
    return replace(launch, sizes=sizes)
