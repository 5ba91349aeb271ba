"""Pinned configurations of the kernels of `matrix`, by GPU, chosen by what they compile to: no spills, then tiles.

Those of sm_90's `prepare`, `forward` and `reverse` are the fastest of some sixty timed on an H100 (bfloat16, K=V=128,
16 heads of 32,768 tokens, Triton 3.6): its narrow blocks of V make twice the programs, of which there are few.
"""

from dataclasses import replace

import torch

from seqtrain.kernels.gpu import Launch

# The longest chunk of any GPU and dtype.
LONGEST = 64

# By target and kernel; those that find pairs of tokens do other work with a decay per channel. BK: the most.
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
        "prepare channel": Launch(warps=4, stages=1, sizes={"BK": 16}),
        "forward": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        "reverse": Launch(warps=4, stages=3, sizes={"BV": 16, "AHEAD": 1}),
        "gradients": Launch(warps=8, stages=2, sizes={"BK": 64, "BV": 64}),
        "gradients channel": Launch(warps=8, stages=1, sizes={"BK": 16, "BV": 64}),
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


def chunk_length(target: str, dtype: torch.dtype) -> int:
    """Tokens a chunk (BT of the kernels) on `target`, for q and k of this dtype: at most LONGEST."""
    # Where operands of products lie in registers, and where they are twice as wide, 64 rows of them spill.
    return 32 if target == "sm_80" or dtype == torch.float32 else LONGEST


def pinned(target: str, kernel: str, key_width: int, dtype: torch.dtype, decay: int) -> Launch:
    """How `kernel` is launched on `target` (one of `gpu.TARGETS`).

    key_width: K, rounded up to a power of two of at least 16; dtype: of q and k; decay: DECAY.
    """
    by_channel = decay == 2 and kernel in ("prepare", "gradients")
    launch = _PINNED[target][f"{kernel} channel" if by_channel else kernel]
    sizes = dict(launch.sizes)
    if kernel in ("forward", "reverse", "step"):
        # All of K is in one program.
        sizes |= {"BK": key_width, "BV": sizes["BV"] if key_width <= 128 else 16}
        if key_width > 128:
            # Operands of more chunks in flight are more than shared memory holds.
            launch = replace(launch, warps=8, stages=1) if decay == 2 else replace(launch, stages=min(2, launch.stages))
    else:
        sizes["BK"] = min(sizes["BK"], key_width)
    if kernel != "step":
        sizes["BT"] = chunk_length(target, dtype)
    return replace(launch, sizes=sizes)
