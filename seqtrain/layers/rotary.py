"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 15), and counting positions across pieces."""

import torch
from torch import Tensor

from seqtrain.layers.norms import upcast
from seqtrain.parallel.sequence import SequenceContext


def positions(x: Tensor, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
    """The place of each token of `x: [B,T,...]` in its row or document: int64 `[B,T]`, or `[1,T]` where all rows agree.

    `past`: int64 `[B]` (`[N]` with documents), tokens seen before; None for none. Returns it after these tokens, too.
    """
    batch, tokens = x.shape[:2]
    before, after = sequence.count(past, batch, tokens, x.device)
    return sequence.positions(tokens, x.device)[None] + before, after


def rotate(x: Tensor, place: Tensor, base: float, *, stretch: tuple[float, ...] = (), amplitude: float = 1.0) -> Tensor:
    """Turns channel pair i of `x: [B,T,H,K]` by the angle `place * base ** (-2i/K)`. `place`: int64 `[B or 1, T]`.

    Channel i pairs with channel `i + K/2`. Scores of rotated queries and keys depend on the distance of positions only.
    `stretch`: K/2 factors on the pairs' wavelengths, none for 1, and `amplitude`, a factor on the result: what models
    are given to read further than they were first trained (YaRN, arXiv 2309.00071; Llama 3.1).
    """
    half = x.shape[-1] // 2
    # float64 costs little on [T, K/2] and keeps far positions exact: 1e6 radians in float32 are 0.06 off.
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    if stretch:
        rate = rate / torch.tensor(stretch, dtype=torch.float64, device=x.device)
    angle = place[..., None, None] * rate  # B T 1 K/2
    wide = upcast(x)
    cos, sin = (amplitude * angle.cos()).to(wide.dtype), (amplitude * angle.sin()).to(wide.dtype)
    first, second = wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
