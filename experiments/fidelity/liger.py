"""Liger's two halves: the window sees what is near, the recurrence also what is far (arXiv 2503.01496)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from seqtrain.mixers import MIXERS, LayerShape

TOKENS, WIDTH, HEADS, WINDOW = 256, 64, 4, 64
DISTANCES = (1, 8, 32, 63, 64, 128, 192)
NAMES = ("liger_gla", "liger_gsa", "liger_hgrn2")


def measure(effort: Effort) -> Iterator[Figure]:
    """How much a token moves the last one's output from afar, with both halves and with one left out."""
    for name in NAMES:
        rows = {without: [_reach(name, without, seed) for seed in effort.seeds] for without in ("", "memory", "window")}
        yield Figure(
            f"{name}: share of its influence at distance {DISTANCES[-1]} that is left without the recurrence",
            tuple(part[-1] / whole[-1] for part, whole in zip(rows["memory"], rows[""], strict=True)),
            Bounds(at_most=1e-9),
            length=TOKENS,
        )
        yield Figure(
            f"{name}: share of its influence at distance {DISTANCES[-1]} that is left without the window",
            tuple(part[-1] / whole[-1] for part, whole in zip(rows["window"], rows[""], strict=True)),
            Bounds(0.99, 1.01),
            length=TOKENS,
            curves=seed_curves(name, effort.seeds, DISTANCES, rows[""]),
        )


def _reach(name: str, without: str, seed: int) -> list[float]:
    torch.manual_seed(seed)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(window=WINDOW), LayerShape(WIDTH, HEADS)).double()
    mixer.without = without
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    signs = torch.randn(WIDTH, dtype=torch.float64)
    gradient: Tensor
    (gradient,) = torch.autograd.grad((mixer(x)[0][0, -1] * signs).sum(), x)
    sizes = gradient[0].norm(dim=-1).flip(0)
    return [sizes[distance].item() for distance in DISTANCES]


ROW = Row(
    name="liger",
    claim="Liger attention joins a window with a gated recurrence that reaches beyond it (Lan et al. 2025, "
    "arXiv 2503.01496)",
    method=f"gradients of the last of {TOKENS} tokens in a layer as it begins, windows of {WINDOW} keys, with "
    "each half left out. That both are needed for quality after conversion takes the published tokens, "
    "which this row does not spend",
    axes=Axes("distance, tokens", "norm of the gradient", log_y=True),
    measure=measure,
    sources=("2503.01496",),
)
