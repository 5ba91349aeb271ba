"""Whether a longer query looks more sharply: MALA's weights do, divided weights can't (arXiv 2507.00698)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from seqtrain.layers import elu, upcast
from seqtrain.mixers.mala import SMALLEST

TOKENS, HEADS, KEY = 256, 8, 16
# Queries are multiplied by these.
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)


def measure(effort: Effort) -> Iterator[Figure]:
    """The change of the last token's entropy as queries grow from normal ones to `SCALES[-1]` times their length."""
    contenders = (
        ("mala", magnitude_aware_weights, Bounds(at_most=-0.2)),
        ("linear_attention", divided_weights, Bounds(at_least=-0.05)),
    )
    for what, weights, bounds in contenders:
        entropies = [[_entropy(weights, scale, seed) for scale in SCALES] for seed in effort.seeds]
        yield Figure(
            what=f"{what}: change of entropy, nats, for queries {SCALES[-1]:g} times as long",
            values=tuple(row[-1] - row[0] for row in entropies),
            length=TOKENS,
            curves=seed_curves(what, effort.seeds, SCALES, entropies),
            bounds=bounds,
        )


def magnitude_aware_weights(q: Tensor, k: Tensor) -> Tensor:
    """MALA's weights, `[B,H,T,T]`, zero after the token.

    `q, k`: `[B,T,H,K]` before the feature map. Rows sum to 1; entries may be negative.
    """
    q, k = (elu(upcast(x)).transpose(1, 2) for x in (q, k))  # B H T K
    score = (q @ k.mT * q.shape[-1] ** -0.5).tril()
    count = torch.arange(1, score.shape[-1] + 1, device=q.device)[:, None]
    mean = (score.sum(-1, keepdim=True) / count).clamp(min=SMALLEST)
    return ((score * (1 + 1 / mean) - mean) / count).tril()


def divided_weights(q: Tensor, k: Tensor) -> Tensor:
    """Linear attention's weights, scores over their sum, elu + 1: `q, k: [B,T,H,K]` -> `[B,H,T,T]`."""
    score = (elu(q).transpose(1, 2) @ elu(k).transpose(1, 2).mT).tril()
    return score / score.sum(-1, keepdim=True)


def entropy(weights: Tensor) -> Tensor:
    """Nats, over the last dimension. Negative weights, which MALA's may be, count as none; the rest sum to 1."""
    share = weights.clamp(min=0)
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def _entropy(weights: Callable[[Tensor, Tensor], Tensor], scale: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, TOKENS, HEADS, KEY, generator=generator)
    return entropy(weights(scale * q, k)[0, :, -1]).mean().item()


ROW = Row(
    name="entropy",
    claim="the entropy of MALA's attention falls as the query's norm grows, plain linear attention's does not "
    "(arXiv 2507.00698)",
    method=f"random queries and keys, {TOKENS} tokens, {HEADS} heads of width {KEY}; mean over the heads of the last "
    "token's entropy. Linear attention's own change comes from elu + 1, which isn't homogeneous; its limit is the "
    "entropy of relu. The bounds of -0.2 and -0.05 nats are ours: the paper gives none",
    axes=Axes("factor of the queries", "entropy, nats", log_x=True),
    measure=measure,
    sources=("2507.00698",),
)
