"""Whether a query's length sharpens NaLaFormer's weights, and by what power it does so (arXiv 2506.21137)."""

from collections.abc import Iterator

import torch

from experiments.fidelity.entropy import entropy
from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from seqtrain.mixers.nalaformer import key_features, query_features

TOKENS, HEADS, KEY, POWER = 256, 8, 16, 3.0
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def measure(effort: Effort) -> Iterator[Figure]:
    """The last token's entropy for queries of length 1/4 to 4, and the power of the shortest and the longest."""
    entropies, powers = [], []
    for seed in effort.seeds:
        generator = torch.Generator().manual_seed(seed)
        direction, k = torch.randn(2, TOKENS, HEADS, KEY, generator=generator, dtype=torch.float64)
        direction = torch.nn.functional.normalize(direction[-1], dim=-1)
        keys = key_features(k, POWER)
        row = []
        for length in LENGTHS:
            scores = torch.einsum("hk,thk->ht", query_features(length * direction, POWER), keys)
            row.append(entropy(scores).mean().item())
        entropies.append(row)
        # Of a direction along one channel and another, a feature is the share to the power.
        pair = torch.tensor([0.6, 0.8], dtype=torch.float64)
        powers.append(
            [query_features(length * pair, POWER)[0].log().item() / -0.5108256237659907 for length in LENGTHS]
        )
    yield Figure(
        "change of entropy, nats, from a query of length 1/4 to one of 4",
        tuple(row[-1] - row[0] for row in entropies),
        Bounds(at_most=-0.1),
        length=TOKENS,
        curves=seed_curves("NaLaFormer", effort.seeds, LENGTHS, entropies),
    )
    yield Figure("power of a query of length 1/4", tuple(row[0] for row in powers), Bounds(1.5, 2.5))
    yield Figure("power of a query of length 4", tuple(row[-1] for row in powers), Bounds(4.4, 4.5))


ROW = Row(
    name="nalaformer",
    claim="NaLaFormer's power follows the query's length, and its attention sharpens with it (arXiv 2506.21137)",
    method=f"random directions and keys, {TOKENS} tokens, {HEADS} heads of width {KEY}, power {POWER:g}; the mean over "
    "heads of the last token's entropy. The bound of 0.1 nats is ours; powers are 3 (1/2 + tanh of the length)",
    axes=Axes("length of the query", "entropy, nats", log_x=True),
    measure=measure,
    sources=("2506.21137",),
)
