"""Recalling many pairs: a memory that corrects itself holds more of them in a state of the same size."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row
from experiments.fidelity.training import Recipe, Stage, score, small_model, train_seeds
from seqtrain.data.synthetic import make_task
from seqtrain.kernels import delta_rule, linear_attention
from seqtrain.layers import elu, l2norm

# Pairs, tokens, layers, width, heads and convolution are those of the authors' benchmark of DeltaNet on this task
# (HazyResearch/zoology, zoology/experiments/models_repo.py: width 64, two heads). Its 8,192 symbols are 256 here.
PAIRS, LENGTH, SYMBOLS = 64, 256, 128
WIDTH, HEADS, DEPTH = 64, 2, 2
RECIPE = Recipe(lr=3e-3)
# Pairs, most steps, rows per step, and the share of right answers that ends a stage of the curriculum.
STAGES = ((8, 400, 128, 0.9), (16, 100, 64, 0.9), (32, 100, 32, 0.9), (PAIRS, 2400, 16, 0.99))
# All have two heads of 32 x 32 numbers per layer, and the same short convolution.
CONTENDERS: tuple[tuple[str, str, dict[str, Any], Bounds], ...] = (
    ("gated_delta_net", "gated_delta_net", {"expand_key": 1.0, "expand_value": 1.0}, Bounds(at_least=0.95)),
    ("delta_net", "delta_net", {}, Bounds(at_least=0.95)),
    ("linear_attention", "linear_attention", {"conv_width": 4}, Bounds(at_most=0.6)),
    (
        "linear_attention, no feature map, normalized output",
        "linear_attention",
        {"conv_width": 4, "feature_map": "identity", "normalizer": "rms"},
        Bounds(at_most=0.6),
    ),
)
# Memories that are measured without training: what is written with which step; None: every pair is added.
MEMORIES: tuple[tuple[str, bool, float | None], ...] = (
    ("added, keys of any sign", False, None),
    ("added, keys after elu + 1", True, None),
    ("delta rule, beta 1", False, 1.0),
    ("delta rule, beta 0.25", False, 0.25),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """What the states hold of random keys, then accuracy on held-out rows after 8, 16, 32, and 64 pairs."""
    for name, positive, beta in MEMORIES:
        held = tuple(
            share_held(positive=positive, beta=beta, rows=effort.of(32), width=WIDTH // HEADS, seed=seed)
            for seed in effort.seeds
        )
        yield Figure(f"random keys, {name}", held, chance=1 / SYMBOLS)
    stages = []
    for pairs, steps, batch, enough in STAGES:
        task = make_task("mqar", {"pairs": pairs, "keys": SYMBOLS, "values": SYMBOLS})
        stages.append(Stage(task, 4 * pairs, effort.of(steps), batch, enough))
    small = partial(small_model, task, width=WIDTH, heads=HEADS, depth=DEPTH, initializer_range=0.1)
    recalled = partial(score, task=task, length=LENGTH, rows=effort.of(128))
    for what, mixer, fields, bounds in CONTENDERS:
        build = partial(small, mixer, fields)
        yield train_seeds(what, build, stages, RECIPE, recalled, effort, bounds, task.chance)


def share_held(*, positive: bool, beta: float | None, rows: int, width: int, seed: int) -> float:
    """The share of `PAIRS` pairs that a layer's state gives back: one of `SYMBOLS` values, the nearest to what is read.

    Keys, of unit length and `width` channels per head, and the values' directions are random, where a trained model
    chooses them. `positive`: keys pass through elu + 1 first. `beta`: step of the delta rule; None: pairs are added.
    """
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, PAIRS, HEADS, width, generator=draw)
    directions = l2norm(torch.randn(SYMBOLS, HEADS, width, generator=draw))
    answers = torch.randint(SYMBOLS, (rows, PAIRS), generator=draw)
    k, v = l2norm(elu(keys) if positive else keys), directions[answers]
    if beta is None:
        _, state = linear_attention(k, k, v)
    else:
        _, state = delta_rule(k, k, v, torch.full(k.shape[:3], beta))
    read: Tensor = torch.einsum("bthk,bhkv->bthv", k, state).flatten(2)
    nearest = F.linear(read, directions.flatten(1)).argmax(-1)
    return (nearest == answers).float().mean().item()


ROW = Row(
    name="recall",
    claim=f"with {PAIRS} pairs, more than linear attention's state holds, Gated DeltaNet and DeltaNet recall at least "
    "0.95 of the values and linear attention less than 0.6 at equal state size (the task: Arora et al. 2023, "
    "arXiv 2312.04927; DeltaNet on it: Yang et al. 2024, arXiv 2406.06484; the numbers are ours)",
    method=f"multi-query associative recall, {SYMBOLS} keys and values, {LENGTH} tokens; {DEPTH} layers of width "
    f"{WIDTH} with two heads of 32 x 32 numbers, and a short convolution of 4 tokens, in all. Pairs, tokens, layers, "
    "width, heads and convolution are those of the smallest DeltaNet of the task's authors (HazyResearch/zoology); "
    "they have 8,192 symbols, no MLP, a further convolution, four learning rates, and 180,000 rows 32 times, where a "
    f"seed here has {sum(steps * batch for _, steps, batch, _ in STAGES):,} at most, by a curriculum of 8, 16, 32 and "
    f"{PAIRS} pairs. 'Random keys': what one layer's state holds without training; a value is told from the other "
    "127 by its direction, so adding pairs holds more of them than a head has key channels, a delta rule of step 1 "
    "holds fewer than adding, and keys after elu + 1 hold few. So the claim can be expected of elu + 1, the published "
    "form, and not of linear attention without a feature map, which is held to it all the same. With elu + 1 the mean "
    "hides that a seed can learn it: 0.88, 0.14 and 0.20 in one run, still rising. Tried on 64 pairs: 400 steps of 32 "
    "rows, three seeds: 0.75 for Gated DeltaNet (0.74, 0.94, 0.57), 0.941 for DeltaNet; 1,200 of 32 rows: "
    "0.952 for Gated DeltaNet on one thread (0.90, 0.99, 0.97) and 0.923 on two (0.88, 0.99, 0.90), whose sums round "
    "otherwise; a rate of 1e-2: 0.46 for Gated DeltaNet (seed 0). Its two heads per layer begin with decays drawn "
    "at random, from slow to ones that forget within a few tokens, and most steps go into unlearning the fast ones. "
    "Earlier trials with one head of 64 x 64 numbers: 0.92 for Gated DeltaNet, 0.95 to 0.99 for DeltaNet; for linear "
    "attention 0.90 without a feature map after 100 steps on 64 pairs, and 0.03 with elu + 1, which had not learned 8 "
    "pairs either: such a figure says that the rule was not learned, not that the state is full",
    axes=Axes("step", "training accuracy"),
    measure=measure,
    sources=("2406.06484", "2312.04927"),
    settings={
        "pairs": PAIRS,
        "tokens": LENGTH,
        "keys and values": SYMBOLS,
        "width": WIDTH,
        "heads": HEADS,
        "layers": DEPTH,
        "stages (pairs, steps, rows, enough)": STAGES,
        "recipe": RECIPE,
        "mixers": CONTENDERS,
    },
)
