"""Parity far beyond the training length: it takes a state that can change its sign (arXiv 2411.12537)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row
from experiments.fidelity.training import Recipe, Stage, score, small_model, train_seeds
from seqtrain.data.synthetic import make_task

LENGTH, FACTOR, WIDTH, HEADS, STEPS, BATCH = 32, 4, 32, 2, 1000, 64
RECIPE = Recipe(lr=1e-2)
# What is trained, its mixer's fields, and the bounds of the claim. Near chance: within 0.1.
CONTENDERS: tuple[tuple[str, str, dict[str, Any], Bounds], ...] = (
    (
        "delta_net, beta in [0, 2]",
        "delta_net",
        {"allow_negative_eigenvalues": True, "conv_width": 0},
        Bounds(at_least=0.95),
    ),
    ("delta_net, beta in [0, 1]", "delta_net", {"conv_width": 0}, Bounds(0.4, 0.6)),
    ("linear_attention", "linear_attention", {}, Bounds(0.4, 0.6)),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """Accuracy on the last quarter of rows four times as long as those of the training."""
    task = make_task("parity")
    stage = Stage(task, LENGTH, effort.of(STEPS), BATCH)
    small = partial(small_model, task, width=WIDTH, heads=HEADS, depth=1, initializer_range=0.15)
    far = partial(score, task=task, length=FACTOR * LENGTH, rows=effort.of(256), first=(FACTOR - 1) * LENGTH)
    for what, mixer, fields, bounds in CONTENDERS:
        yield train_seeds(what, partial(small, mixer, fields), [stage], RECIPE, far, effort, bounds, task.chance)


ROW = Row(
    name="parity",
    claim="DeltaNet with beta in [0, 2] tracks parity at four times the training length, with beta in [0, 1] and "
    "linear attention it stays near chance (Grazzi et al. 2024, arXiv 2411.12537; at least 0.95, and 0.5 +- 0.1, are "
    "our bounds)",
    method=f"one layer without decay, trained on {LENGTH} tokens, scored on tokens {(FACTOR - 1) * LENGTH} to "
    f"{FACTOR * LENGTH} of held-out rows, which no training row reaches. Initial weights have deviation 0.15, about "
    "width ** -0.5. No short convolution in any of the three: the state alone has to track the parity",
    axes=Axes("step", "training accuracy"),
    measure=measure,
    sources=("2411.12537", "2406.06484"),
    settings={
        "tokens": LENGTH,
        "times longer": FACTOR,
        "width": WIDTH,
        "heads": HEADS,
        "layers": 1,
        "steps": STEPS,
        "rows per step": BATCH,
        "recipe": RECIPE,
        "mixers": CONTENDERS,
    },
)
