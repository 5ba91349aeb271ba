"""Inverting a permutation: beyond a decoder without scratch tokens, learned with them (arXiv 2509.24125)."""

from collections.abc import Iterator
from functools import partial

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row
from experiments.fidelity.training import Recipe, Stage, score, small_model, train_seeds
from seqtrain.data.synthetic import make_task

THINGS, SYMBOLS, STEPS, BATCH = 6, 8, 700, 64
WIDTH, HEADS, DEPTH = 64, 4, 2
RECIPE = Recipe(lr=3e-3)


def measure(effort: Effort) -> Iterator[Figure]:
    """Accuracy of attention without scratch tokens and with as many as there are things, beside the exact ceiling."""
    for scratch in (0, THINGS):
        task = make_task("inverse_permutation", {"things": THINGS, "symbols": SYMBOLS, "scratch": scratch})
        length = THINGS + scratch
        stage = Stage(task, length, effort.of(STEPS), BATCH, enough=0.99)
        build = partial(
            small_model, task, "attention", {}, width=WIDTH, heads=HEADS, depth=DEPTH, initializer_range=0.1
        )
        scored = partial(score, task=task, length=length, rows=effort.of(512))
        ceiling = task.ceiling  # type: ignore[attr-defined]
        bounds = Bounds(at_least=0.9) if scratch else Bounds(at_most=ceiling + 0.03)
        what = f"attention, {scratch} scratch tokens (ceiling {ceiling:.3f})"
        yield train_seeds(what, build, [stage], RECIPE, scored, effort, bounds, task.chance)


ROW = Row(
    name="inverse_permutation",
    claim="a decoder can't invert a permutation at its own tokens, and learns to with scratch tokens after it (2025, "
    "arXiv 2509.24125)",
    method=f"{THINGS} things of {SYMBOLS} symbols, {DEPTH} layers of width {WIDTH}. The ceiling is exact: what came "
    "before is known, the rest is a guess of one symbol. 0.03 above it is room for the sample",
    axes=Axes("step", "training accuracy"),
    measure=measure,
    sources=("2509.24125",),
    settings={
        "things": THINGS,
        "symbols": SYMBOLS,
        "steps": STEPS,
        "rows per step": BATCH,
        "width": WIDTH,
        "heads": HEADS,
        "layers": DEPTH,
        "recipe": RECIPE,
    },
)
