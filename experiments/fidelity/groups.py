"""Linear group RNNs: without a shift between layers no token sees beyond its group (LION, arXiv 2407.18232)."""

from collections.abc import Iterator

import torch

from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig

TOKENS, GROUP, DEPTHS = 32, 8, (1, 2, 4, 6, 7, 8)


def measure(effort: Effort) -> Iterator[Figure]:
    """How many tokens change what is made of the last one, by the number of layers."""
    found = {shift: [[_reaching(shift, depth, seed) for depth in DEPTHS] for seed in effort.seeds] for shift in (0, 4)}
    curves = tuple(
        Curve(f"shift {shift}, seed {effort.seeds[0]}", DEPTHS, tuple(rows[0])) for shift, rows in found.items()
    )
    bounds = {0: Bounds(GROUP, GROUP), 4: Bounds(TOKENS, TOKENS)}
    for shift, rows in found.items():
        what = f"tokens that reach the last of {TOKENS} after {DEPTHS[-1]} layers, shift {shift}"
        yield Figure(what, tuple(row[-1] for row in rows), bounds[shift], length=TOKENS, curves=curves if shift else ())


@torch.no_grad()
def _reaching(shift: int, depth: int, seed: int) -> float:
    torch.manual_seed(seed)
    config = ModelConfig(
        layers=("gla",),
        depth=depth,
        width=16,
        heads=2,
        groups=(GROUP,),
        group_shift=(0, shift),
        initializer_range=0.3,
    )
    model = LanguageModel(config, {"gla": MIXERS.get("gla").Config()}, 20).double()
    tokens = torch.randint(20, (1, TOKENS))
    changed = tokens.repeat(TOKENS, 1)
    changed[torch.arange(TOKENS), torch.arange(TOKENS)] += 1
    last, others = model(tokens)[0], model(changed % 20)[0]
    return float(((others - last).abs().amax(-1) > 1e-13).sum())


ROW = Row(
    name="groups",
    claim="a shift of groups from layer to layer lets all tokens interact at the cost of groups (LION, Liu et "
    "al. 2024, arXiv 2407.18232)",
    method=f"groups of {GROUP} tokens, every other layer shifted by half a group or none: tokens that change the "
    "last one's output. Cells that are missing from a cloud are not generated here: LION generates them "
    "by features copied along the scan, which for a causal model is what any next token is",
    axes=Axes("layers", "tokens that reach the last"),
    measure=measure,
    sources=("2407.18232",),
)
