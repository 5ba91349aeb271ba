"""Over-smoothing: DyDiLA's weights have a lower entropy than plain linear attention's (arXiv 2601.13683)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.fidelity.entropy import divided_weights, entropy
from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from seqtrain.mixers.dydila import sharpened

TOKENS, HEADS, KEY = 256, 8, 16
POWERS = (1.0, 2.0, 3.0, 4.0)


def measure(effort: Effort) -> Iterator[Figure]:
    """Entropy of the last token's weights by the power of the dynamic measure, against elu + 1."""
    sharp, plain, ranks = [], [], []
    for seed in effort.seeds:
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(2, 1, TOKENS, HEADS, KEY, generator=generator, dtype=torch.float64)
        plain.append(entropy(divided_weights(q, k)[0, :, -1]).mean().item())
        sharp.append([entropy(_scores(q, k, power)[:, -1]).mean().item() for power in POWERS])
        ranks.append((_effective_rank(_scores(q, k, 3.0)), _effective_rank(_scores(q, k, 1.0))))
    yield Figure(
        "entropy, nats: DyDiLA at its initial power of 3, less linear attention's",
        tuple(row[2] - other for row, other in zip(sharp, plain, strict=True)),
        Bounds(at_most=-0.5),
        length=TOKENS,
        curves=seed_curves("DyDiLA", effort.seeds, POWERS, sharp),
    )
    yield Figure(
        "effective rank of the scores, power 3 over power 1",
        tuple(high / low for high, low in ranks),
        Bounds(at_least=1.1),
        length=TOKENS,
    )


def _scores(q: Tensor, k: Tensor, power: float) -> Tensor:
    """`[H,T,T]`."""
    q, k = (sharpened(part[0], torch.full((), power, dtype=part.dtype)).transpose(0, 1) for part in (q, k))
    return q @ k.mT


def _effective_rank(scores: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares, mean over heads."""
    return entropy(torch.linalg.svdvals(scores)).exp().mean().item()


ROW = Row(
    name="dydila",
    claim="DyDiLA's dynamic measure makes linear attention's weights less smooth, of higher rank (arXiv 2601.13683)",
    method=f"random queries and keys, {TOKENS} tokens, {HEADS} heads of width {KEY}. Half a nat and a tenth of "
    "the rank are our bounds: the paper shows pictures",
    axes=Axes("power of the measure", "entropy, nats"),
    measure=measure,
    sources=("2601.13683",),
)
