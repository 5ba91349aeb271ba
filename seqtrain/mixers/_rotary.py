"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 15), and counting positions across pieces."""

import torch
from torch import Tensor

from seqtrain.mixers._parts import precise
from seqtrain.parallel.sequence import Sequence


def positions(x: Tensor, past: Tensor | None, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """The place of each token of `x: [B,T,...]` in its row or document: int64 `[B,T]`, or `[1,T]` where all rows agree.

    `past`: int64 `[B]` (`[N]` with documents), tokens seen before; None for none. Returns it after these tokens, too.
    """
    batch, tokens = x.shape[:2]
    place = sequence.positions(tokens, x.device)[None]  # 1 T
    if sequence.cu_seqlens is None:
        seen = torch.full((batch,), tokens, dtype=torch.int64, device=x.device)
    else:
        seen = sequence.cu_seqlens.to(device=x.device, dtype=torch.int64).diff()
    if past is None:
        return place, seen
    before = past[:, None] if sequence.cu_seqlens is None else past.repeat_interleave(seen, output_size=tokens)
    return place + before, seen + past


def rotate(x: Tensor, place: Tensor, base: float) -> Tensor:
    """Turns channel pair i of `x: [B,T,H,K]` by the angle `place * base ** (-2i/K)`. `place`: int64 `[B or 1, T]`.

    Channel i pairs with channel `i + K/2`. Scores of rotated queries and keys depend on the distance of positions only.
    """
    half = x.shape[-1] // 2
    # float64 costs little on [T, K/2] and keeps far positions exact: 1e6 radians in float32 are 0.06 off.
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = place[..., None, None] * rate  # B T 1 K/2
    wide = precise(x)
    cos, sin = angle.cos().to(wide.dtype), angle.sin().to(wide.dtype)
    first, second = wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
