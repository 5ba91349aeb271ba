"""Handwritten digits pixel by pixel: a state-space layer in both directions against one that sums."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row
from experiments.fidelity.training import Recipe, Stage, mixer_config, score, train_seeds
from seqtrain.data.synthetic import make_task
from seqtrain.models import LanguageModel, ModelConfig

LENGTH, WIDTH, DEPTH, STEPS, BATCH = 64, 32, 2, 400, 32
RECIPE = Recipe(lr=4e-3)
CONTENDERS: tuple[tuple[str, dict[str, Any], Bounds], ...] = (
    ("s5", {"bidirectional": True}, Bounds(at_least=0.9)),
    ("linear_attention", {}, Bounds(at_most=0.8)),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """The share of held-out images whose digit is right."""
    task = make_task("digits")
    stages = [Stage(task, LENGTH, effort.of(STEPS), BATCH)]
    scored = partial(score, task=task, length=LENGTH, rows=effort.of(512))
    for mixer, fields, bounds in CONTENDERS:
        bounds = bounds if effort.scale >= 0.5 else Bounds(at_least=0)
        yield train_seeds(
            f"{mixer}, both directions" if fields else f"{mixer}, one sum",
            partial(_model, task.vocab_size, mixer, fields),
            stages,
            RECIPE,
            scored,
            effort,
            bounds,
            task.chance,
        )


def _model(vocab: int, mixer: str, fields: Mapping[str, Any], seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = ModelConfig(kind="encoder", layers=(mixer,), depth=DEPTH, width=WIDTH, heads=2, initializer_range=0.1)
    return LanguageModel(config, {mixer: mixer_config(mixer, fields)}, vocab)


ROW = Row(
    name="digits",
    claim="state-space layers in both directions classify images read pixel by pixel, where the order of pixels is all "
    "there is (S5: Smith et al. 2022, arXiv 2208.04933)",
    method=f"scikit-learn's 1,797 images of 8 x 8 pixels, every fifth held out: encoders of {DEPTH} layers of width "
    f"{WIDTH}, {STEPS} steps of {BATCH} images. The second has no positions: it sums over pixels whatever their order, "
    "so it can know of an image little more than how many pixels have each shade. The bounds are ours: the paper's "
    "images are larger. Tried: S4D, 16 states a channel, 600 steps: 0.971 (seed 0), ten times as long",
    axes=Axes("step", "training accuracy"),
    measure=measure,
    sources=("2208.04933",),
    seeds=(0,),
    settings={"steps": STEPS, "rows per step": BATCH, "width": WIDTH, "layers": DEPTH, "recipe": RECIPE},
)
