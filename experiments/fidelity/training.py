"""Training a small model on a synthetic task, and how often it is right."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.fidelity.results import Bounds, Curve, Effort, Figure
from seqtrain.data.batches import IGNORED
from seqtrain.data.synthetic import Task, examples
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.validation import validate

# Seed of the rows every model is scored on; none is trained on.
HELD_OUT_SEED = 0
# Rows scored at once.
SCORED_ROWS = 64
# Steps over which the share of right answers is averaged.
WINDOW = 20


@dataclass(frozen=True)
class Stage:
    """Steps on one form of a task; a curriculum has several."""

    task: Task
    # Tokens per row.
    length: int
    # Most optimizer steps.
    steps: int
    # Rows per step.
    batch: int = 64
    # The stage ends before its last step once this share of a step's answers, averaged over `WINDOW` steps, is right.
    enough: float = 1.01


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    # Highest learning rate; it rises over the first steps and falls along half a cosine to a tenth of it.
    lr: float = 2e-3
    # Share taken off each matrix per step, times the learning rate.
    weight_decay: float = 0.1
    # Largest norm of a step's gradient.
    clip: float = 1.0
    # Steps over which the rate rises.
    warmup: int = 50


@dataclass(frozen=True)
class Trained:
    """What training took."""

    steps: int
    seconds: float
    # Share of right answers in every step, in order.
    curve: tuple[float, ...]


def train(model: torch.nn.Module, stages: Sequence[Stage], recipe: Recipe, *, seed: int) -> Trained:
    """Trains `model` in place with AdamW in float32, on rows that follow from `seed` and the step.

    `model(tokens, all_logits=True)` gives `(logits, ...)`, as `LanguageModel` does.
    """
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.95))
    started, drawn = time.perf_counter(), 0
    curve: list[float] = []
    planned = sum(stage.steps for stage in stages)
    done_before = 0
    for stage in stages:
        recent: list[float] = []
        for step in range(stage.steps):
            tokens, labels = examples(stage.task, length=stage.length, seed=seed, first=drawn, count=stage.batch)
            drawn += stage.batch
            rate = _rate(recipe, done_before + step, planned)
            for group in optimizer.param_groups:
                group["lr"] = rate
            recent.append(_step(model, tokens, labels, optimizer, recipe.clip))
            if len(recent) >= WINDOW and sum(recent[-WINDOW:]) / WINDOW >= stage.enough:
                break
        curve += recent
        # The rate follows the plan: a stage that ends early leaves the next its own share of the schedule.
        done_before += stage.steps
    return Trained(len(curve), time.perf_counter() - started, tuple(curve))


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _step(
    model: torch.nn.Module, tokens: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, clip: float
) -> float:
    logits = model(tokens, all_logits=True)[0]
    asked = labels >= 0
    scores, answers = logits[asked], labels[asked]
    loss = F.cross_entropy(scores, answers)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return (scores.argmax(-1) == answers).float().mean().item()


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@torch.no_grad()
def score(model: torch.nn.Module, task: Task, *, length: int, rows: int, first: int = 0) -> float:
    """The share of right answers on `rows` held-out rows of `length` tokens, from token `first` of each row on."""
    right = asked = 0
    for start in range(0, rows, SCORED_ROWS):
        count = min(SCORED_ROWS, rows - start)
        tokens, labels = examples(task, length=length, seed=HELD_OUT_SEED, first=start, count=count, split="held_out")
        labels[:, :first] = IGNORED
        predicted = model(tokens, all_logits=True)[0].argmax(-1)
        right += int((predicted == labels).sum())
        asked += int((labels != IGNORED).sum())
    return right / asked


def small_model(
    task: Task,
    mixer: str,
    fields: Mapping[str, Any],
    *,
    width: int,
    heads: int,
    depth: int,
    initializer_range: float,
    seed: int,
    mlp_ratio: float = 8 / 3,
) -> LanguageModel:
    """A model of one kind of mixer for the task's tokens; `fields` of the mixer's config that aren't its defaults."""
    torch.manual_seed(seed)
    config = ModelConfig(
        layers=(mixer,),
        depth=depth,
        width=width,
        heads=heads,
        mlp_ratio=mlp_ratio,
        initializer_range=initializer_range,
    )
    return LanguageModel(config, {mixer: mixer_config(mixer, fields)}, task.vocab_size)


def mixer_config(name: str, fields: Mapping[str, Any]) -> Any:
    """The `Config` of a mixer with `fields` in place of its defaults. Raises `ConfigError` for a wrong one."""
    kind: type = MIXERS.get(name).Config
    return validate(kind, fields, prefix=f"mixer.{name}.")


def train_seeds(
    what: str,
    build: Callable[..., LanguageModel],
    stages: Sequence[Stage],
    recipe: Recipe,
    scored: Callable[[LanguageModel], float],
    effort: Effort,
    bounds: Bounds,
    chance: float,
) -> Figure:
    """The figure of one contender: `build(seed=...)`, trained and scored, once per seed."""
    values, runs = [], []
    for seed in effort.seeds:
        model = build(seed=seed)
        runs.append(train(model, stages, recipe, seed=seed))
        values.append(scored(model))
    curve, length = smooth(runs[0].curve), stages[-1].length
    return Figure(
        what=what,
        values=tuple(values),
        bounds=bounds,
        chance=chance,
        length=length,
        steps=tuple(run.steps for run in runs),
        seconds=tuple(run.seconds for run in runs),
        parameters=model.parameter_count(),
        state_bytes=model.state_bytes(length),
        curves=(Curve(f"{what}, seed {effort.seeds[0]}", tuple(range(1, len(curve) + 1)), curve),),
    )


def smooth(values: Sequence[float], window: int = WINDOW) -> tuple[float, ...]:
    """The mean of each value and the `window - 1` before it."""
    sums = list(accumulate(values, initial=0.0))
    return tuple((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values)))
