"""A cloud's points in groups: what LION's shift and spatial descriptor make of neighbors that lie elsewhere."""

from collections.abc import Iterator
from functools import partial

import torch

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row
from experiments.fidelity.training import Recipe, Stage, score, train_seeds
from seqtrain.data.synthetic import make_task
from seqtrain.models import LanguageModel, ModelConfig

SIDE, LENGTH, GROUP, WIDTH, DEPTH, STEPS, BATCH = 4, 32, 8, 48, 4, 300, 32
RECIPE = Recipe(lr=4e-3)
# Groups, their shift, the descriptor's side: none of these, one more at a time.
CONTENDERS = (
    ("groups", (GROUP,), (0,), 0, Bounds(at_most=0.95)),
    ("groups, shifted", (GROUP,), (0, GROUP // 2), 0, Bounds()),
    ("groups, with the descriptor", (GROUP,), (0,), SIDE, Bounds(at_least=0.97)),
    ("no groups", (0,), (0,), 0, Bounds()),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """The share of points of which it is right whether an earlier one touches them, on held-out clouds."""
    task = make_task("point_cloud", {"side": SIDE})
    stages = [Stage(task, LENGTH, effort.of(STEPS), BATCH)]
    scored = partial(score, task=task, length=LENGTH, rows=effort.of(256))
    for what, groups, shift, descriptor, bounds in CONTENDERS:
        build = partial(_model, task.vocab_size, groups, shift, descriptor)
        bounds = bounds if effort.scale >= 0.5 else Bounds(at_least=0)
        yield train_seeds(what, build, stages, RECIPE, scored, effort, bounds, task.chance)


def _model(vocab: int, groups: tuple[int, ...], shift: tuple[int, ...], descriptor: int, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        layers=("gla",),
        depth=DEPTH,
        width=WIDTH,
        heads=2,
        groups=groups,
        group_shift=shift,
        descriptor=descriptor,
        initializer_range=0.1,
    )
    return LanguageModel(config, {}, vocab)


ROW = Row(
    name="clouds",
    claim="linear RNNs in groups need a spatial descriptor: points that touch can be far apart in the sequence, in "
    "other groups (LION, Liu et al. 2024, arXiv 2407.18232)",
    method=f"points of a {SIDE} x {SIDE} x {SIDE} grid sorted by their axes, {LENGTH} a row; at each point, whether an "
    f"earlier one touches it. {DEPTH} layers of gated linear attention of width {WIDTH} in groups of {GROUP} points: "
    "as they are, every other one shifted by half a group, with the descriptor in front, and without groups. Where "
    "points lie is learned from their ids, the same steps for all; the bounds are ours, the paper's figures are of "
    "detection",
    axes=Axes("step", "training accuracy"),
    measure=measure,
    sources=("2407.18232",),
    seeds=(0,),
    settings={"side": SIDE, "points": LENGTH, "group": GROUP, "steps": STEPS, "rows per step": BATCH, "recipe": RECIPE},
)
