"""Seconds to the first token of SpikingBrain-7B's layers against softmax attention's, by the prompt's length."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from experiments.fidelity.timing import fastest
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.models.feed_forward import MLP

# Of the 7B: channels, heads, hidden channels, keys of a window, query heads of a key head.
WIDTH, HEADS, HIDDEN, WINDOW, GROUP = 3584, 28, 18944, 4096, 7
LENGTHS = (4096, 16384, 65536, 262144)
# Tokens that are read at a time where the cost of a place is measured, and turns of which the fastest counts.
CHUNK, REPEATS = 32, 2
PROJECTIONS: dict[str, Any] = {"query_group": GROUP, "qkv_bias": True}
LINEAR = PROJECTIONS | {"memory": "gla", "window": 0, "combine": "norms", "feature_map": "relu"}


def measure(effort: Effort) -> Iterator[Figure]:
    """Seconds of softmax attention over those of linear attention and windows in turns, MLPs in both."""
    lengths = LENGTHS if effort.scale >= 0.1 else LENGTHS[:2]
    rows = [ratios(lengths, seed, small=effort.scale < 0.1) for seed in effort.seeds]
    places = [float(length) for length in lengths]
    yield Figure(
        f"softmax attention's seconds over SpikingBrain-7B's, {lengths[-1]} tokens",
        tuple(row[-1] for row in rows),
        Bounds(at_least=2.0),
        length=lengths[-1],
        curves=seed_curves("times as fast", effort.seeds, places, rows),
    )
    yield Figure(
        f"... over the same for {lengths[-2]} tokens", tuple(row[-1] / row[-2] for row in rows), Bounds(at_least=1.3)
    )


@torch.no_grad()
def ratios(lengths: tuple[int, ...], seed: int, *, small: bool = False) -> list[float]:
    """For each length. `small`: of a layer an eighth as wide."""
    torch.manual_seed(seed)
    width, hidden = (WIDTH // 8, HIDDEN // 8) if small else (WIDTH, HIDDEN)
    x, shape = torch.randn(1, CHUNK, width), LayerShape(width, HEADS)
    mlp = MLP(width, hidden)
    shared = fastest(lambda: mlp(x), REPEATS)
    linear, windowed, full = (
        MIXERS.get(name)(MIXERS.get(name).Config(**fields), shape)
        for name, fields in (
            ("linearized_attention", LINEAR),
            ("sliding_attention", PROJECTIONS | {"window": WINDOW}),
            ("attention", PROJECTIONS),
        )
    )
    spiking = (
        fastest(lambda: linear(x), REPEATS) + fastest(lambda: windowed(x, held(windowed, x, WINDOW - 1)), REPEATS)
    ) / 2
    # Its cost grows with the keys before, from that of none: the mean over a prompt is that of its ends.
    first = fastest(lambda: full(x), REPEATS)
    ends = []
    for length in lengths:
        state = held(full, x, length)
        ends.append(fastest(partial(full, x, state), REPEATS))
    return [(shared + (first + end) / 2) / (shared + spiking) for end in ends]


def held(mixer: Any, x: Tensor, tokens: int) -> dict[str, Tensor]:
    """A state as after so many tokens, of random keys and values."""
    _, state = mixer(x)
    keys = {name: torch.randn(1, tokens, *state[name].shape[2:]) for name in ("k", "v")}
    seen = torch.tensor([tokens])
    return state | keys | {"length": seen, "position": seen}


ROW = Row(
    name="first_token",
    claim="SpikingBrain-7B's time to the first token grows in proportion to the prompt, so does its lead over softmax "
    "attention: 26.5 times as fast at a million tokens on GPUs (Pan et al. 2025, arXiv 2509.05276)",
    method=f"one layer of the 7B's sizes ({WIDTH} channels, {HEADS} heads, {HIDDEN} hidden channels), float32, one "
    f"thread: gated linear attention and windows of {WINDOW} in turns against Qwen2.5's own attention, each with its "
    f"MLP. A prompt is not read whole: {CHUNK} tokens are, with as many keys held as the prompt has tokens, and "
    "with none; attention's cost is linear between, so that a prompt's is the mean of its ends. The bounds are ours; "
    "the report has 1.41 and 2.75 times at 128k in two GPU programs",
    axes=Axes("tokens of the prompt", "times as fast as softmax attention", log_x=True),
    measure=measure,
    sources=("2509.05276",),
    seeds=(0,),
    timed=True,
    settings={"lengths": LENGTHS, "tokens at a time": CHUNK},
)
