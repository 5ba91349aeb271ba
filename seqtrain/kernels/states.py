"""The loops over chunks: states flow from chunk to chunk, and in the backward pass their gradients flow back.

Both directions are the same loop, so it stands here once for linear attention and once for the delta rule. `carry`
`[N*H, K, V]` holds one state per document and head in layout order and is updated in place; `steps` is
`Segment.steps(H)`, reversed for gradients; `starts` receives the carry as each chunk finds it.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

# `Segment.steps`: the rows of each step and how many carried states it updates.
Steps = Sequence[tuple[slice, int]]

# Numbers a segment's temporaries may take, about: 14 MB of float32. Larger segments fall out of the cache, smaller ones
# pay for more operations: the fastest of eight sizes tried on two shared cores, by a margin within their noise.
SEGMENT_NUMBERS = 3_500_000


def chunk_length(key_width: int, value_width: int) -> int:
    """Tokens per chunk: 64, or 32 for narrow heads, where products inside a chunk outweigh those with states.

    Measured, forward + backward on one core: 32 is 7-22% faster at K=V=32, about even at 64, and up to
    13% slower at 128.
    """
    return 32 if max(key_width, value_width) <= 32 else 64


def segment_limit(carry: Tensor, heads: int, chunk: int) -> int:
    """How many chunks of `chunk` tokens to work on at once, for `ChunkLayout.segments`. carry: `[N*H,K,V]`."""
    key_width, value_width = carry.shape[1:]
    row = 2 * chunk * (key_width + value_width) + 2 * key_width * value_width + 3 * chunk * chunk
    return max(1, SEGMENT_NUMBERS // (heads * row))


def scan_additive(carry: Tensor, steps: Steps, factor: Tensor | None, update: Tensor, starts: Tensor) -> None:
    """`carry <- factor * carry + update` in each step.

    factor: None (1), `[R,1,1]` or `[R,K,1]`. update, starts: `[R,K,V]`.
    """
    for rows, found, left in _walk(carry, steps, starts):
        _decay_and_add(found, None if factor is None else factor[rows], update[rows], left)


def scan_through(
    carry: Tensor,
    steps: Steps,
    factor: Tensor | None,
    read: Tensor,
    inner: Tensor,
    write: Tensor,
    update: Tensor | None,
    starts: Tensor,
) -> None:
    """`inner <- inner + read @ carry`, then `carry <- factor * carry + write @ inner + update`, in each step.

    read: `[R,C,K]`. inner: `[R,C,V]`, updated in place. write: `[R,K,C]`. update: `[R,K,V]`, or None for 0.
    """
    for rows, found, left in _walk(carry, steps, starts):
        written = inner[rows].baddbmm_(read[rows], found)
        _decay_and_add(found, None if factor is None else factor[rows], None if update is None else update[rows], left)
        left.baddbmm_(write[rows], written)


def _decay_and_add(state: Tensor, factor: Tensor | None, update: Tensor | None, out: Tensor) -> None:
    """`out = factor * state + update` in one pass; None stands for a factor of 1 or an update of 0."""
    if update is None:
        out.copy_(state) if factor is None else torch.mul(state, factor, out=out)
    elif factor is None:
        torch.add(state, update, out=out)
    else:
        torch.addcmul(update, state, factor, out=out)


def _walk(carry: Tensor, steps: Steps, starts: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each step: its rows, the states it finds (in `starts`), and where to write the states it leaves.

    That is straight into the next step's `starts` while the same documents take part, and into `carry` where that
    changes and at the end: a copy saved on nearly every step.
    """
    starts[steps[0][0]] = carry[: steps[0][1]]
    for (rows, count), following in zip_longest(steps, steps[1:]):
        if following is not None and following[1] == count:
            yield rows, starts[rows], starts[following[0]]
        else:
            yield rows, starts[rows], carry[:count]
            if following is not None:
                starts[following[0]] = carry[: following[1]]


def factor_gradient(factor: Tensor | None, starts: Tensor, d_ends: Tensor) -> Tensor | None:
    """Gradient of a chunk's `factor`, in its shape: `starts * d_ends` summed over what the factor is shared across."""
    if factor is None:
        return None
    if factor.shape[1] == 1:
        return torch.linalg.vecdot(starts.flatten(1), d_ends.flatten(1))[:, None, None]
    return torch.linalg.vecdot(starts, d_ends)[..., None]
