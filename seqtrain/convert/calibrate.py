"""Closed-form corrections of a student on a few rows of text: no gradients, nothing but numbers folded into weights.

Taylor-Calibrate (arXiv 2606.16429): how long a memory lasts (`timescale`) and how much each head counts (`heads`), from
what the teacher's attention does with the same input. Its authors fold a head's factor into the values; here it is in
the output's columns, for norms behind the memory would undo the other. QuantVLA (arXiv 2602.20309): how sharp attention
is (`temperature`) and how much each layer adds (`output`), both as the two models stand, each on what its own layers
before it make of the text.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.layers import RMSNorm, positions, upcast
from seqtrain.mixers import WHOLE
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models import LanguageModel

Calibration = Literal["temperature", "output", "timescale", "heads"]
# The decay per token that a memory may have, and a factor that may be folded in.
DECAYS, FACTORS = (1e-4, 5.0), (0.0, 10.0)
LITTLE = 1e-12


@torch.no_grad()
def calibrate(
    teacher: LanguageModel,
    student: LanguageModel,
    tokens: Tensor,
    which: Collection[Calibration],
    layers: Collection[int],
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, list[float]]]:
    """Corrects the mixers of `layers` in place, the first layer first, by what they make of `tokens: int64 [B,T]`.

    Gives for each layer what was folded in, by the calibration's name; none of one that its mixer has no place for.
    """
    given = own = teacher.embedding(tokens)
    found: dict[str, dict[str, list[float]]] = {}
    for index, (theirs, mine) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
        if index in layers:
            progress(f"layer {index}")
            inputs = theirs.mixer_norm(given), mine.mixer_norm(own)
            # Each on what the ones before it left.
            factors = {name: RULES[name](theirs.mixer, mine.mixer, *inputs) for name in RULES if name in which}
            found[str(index)] = {name: values.tolist() for name, values in factors.items() if values is not None}
        given, own = theirs(given)[0], mine(own)[0]
    return found


def _timescale(theirs: Any, mine: Any, x: Tensor, _: Tensor) -> Tensor | None:
    """A memory forgets half in as many tokens as the teacher's attention looks back, on average."""
    # A memory beside a window, or a layer of its own.
    step = getattr(mine.memory, "step", None) if hasattr(mine, "memory") else mine
    rate, bias = getattr(step, "rate_log", None), getattr(step, "step_bias", getattr(step, "bias", None))
    if rate is None or bias is None:
        return None
    distance = mean_distance(theirs, x)
    decay = (math.log(2) / _spread(distance, rate.numel())).clamp(*DECAYS)
    size = F.softplus(upcast(bias)).unflatten(0, (rate.numel(), -1)).mean(1)
    rate.copy_((decay / size).log())
    return math.log(2) / decay


def _heads(theirs: Any, mine: Any, x: Tensor, _: Tensor) -> Tensor:
    """Each head's part of the output is scaled to that of its teacher's head, by least squares."""
    wanted, came = (_context(mixer, x, theirs.key) for mixer in (theirs, mine))
    wanted = wanted.repeat_interleave(came.shape[2] // wanted.shape[2], 2)
    factor = (wanted * came).sum((0, 1, 3)) / came.square().sum((0, 1, 3)).clamp(min=LITTLE)
    factor = factor.clamp(*FACTORS)
    mine.out.weight.mul_(factor.repeat_interleave(theirs.key))
    return factor


def _temperature(theirs: Any, mine: Any, x: Tensor, y: Tensor) -> Tensor | None:
    """Scores of queries and keys spread as widely as the teacher's, head by head."""
    if not isinstance(mine, SoftmaxAttention):
        return None
    spread = [_scores(mixer, each).std(1) for mixer, each in ((theirs, x), (mine, y))]
    factor = (spread[0] / spread[1].clamp(min=LITTLE)).clamp(*FACTORS)
    if isinstance(norm := mine.q_norm, RMSNorm):
        # One weight serves all heads.
        factor = factor.mean(0, keepdim=True)
        shift = float(norm.zero_centered)
        norm.weight.copy_((norm.weight + shift) * factor - shift)
        return factor
    path, rows = mine.projections()["q"]
    every = factor.repeat_interleave(mine.key)
    mine.get_parameter(path)[rows].mul_(every[:, None])
    if mine.qkv.bias is not None:
        mine.qkv.bias[rows].mul_(every)
    return factor


def _output(theirs: Any, mine: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a layer adds has the size of what its teacher's adds."""
    wanted, came = (upcast(mixer(each)[0]).square().mean().sqrt() for mixer, each in ((theirs, x), (mine, y)))
    factor = (wanted / came.clamp(min=LITTLE)).clamp(*FACTORS)
    for parameter in mine.out.parameters():
        parameter.mul_(factor)
    return factor[None]


# In the order in which they are applied.
RULES: Mapping[Calibration, Callable[[Any, Any, Tensor, Tensor], Tensor | None]] = {
    "timescale": _timescale,
    "heads": _heads,
    "temperature": _temperature,
    "output": _output,
}


def mean_distance(attention: SoftmaxAttention, x: Tensor) -> Tensor:
    """How many tokens back a head looks on average, `[H]`, for the layer's input `x: [B,T,D]`; 0.5 at least."""
    place = torch.arange(x.shape[1])
    distance = (place[:, None] - place).clamp(min=0).float()
    found = [(scores.softmax(-1) * distance).sum(-1).mean(-1) for scores in _rows_of_scores(attention, x)]
    return torch.stack(found).mean(0).clamp(min=0.5)


def _rows_of_scores(attention: SoftmaxAttention, x: Tensor) -> Iterator[Tensor]:
    """Scores `[H,T,T]` of one row after the other, -inf for what is not seen."""
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if attention.window:
        seen &= ~seen.tril(-attention.window)
    for row in x.split(1):
        q, k, *_ = attention.project(row)
        place, _ = positions(row, None, WHOLE)
        q, k = (upcast(attention.rotated(each, place)) for each in (q, k))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("thk,shk->hts", q[0], k[0]) * (attention.config.scale or attention.key**-0.5)
        yield scores.masked_fill(~seen, -torch.inf)


def _scores(attention: SoftmaxAttention, x: Tensor) -> Tensor:
    """Every score that counts, `[H,n]`."""
    return torch.cat([scores[:, scores[0] > -torch.inf] for scores in _rows_of_scores(attention, x)], 1)


def _context(mixer: nn.Module, x: Tensor, key: int) -> Tensor:
    """What enters the mixer's output projection, by head: `[B,T,heads,K]`."""
    with _entering(mixer.get_submodule("out")) as entered:
        mixer(x)
    [found] = entered
    return upcast(found).unflatten(-1, (-1, key))


@contextmanager
def _entering(module: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    try:
        yield found
    finally:
        handle.remove()


def _spread(values: Tensor, count: int) -> Tensor:
    """Of as many heads: each again where these are more, the mean of those that share one where they are fewer."""
    if count >= len(values):
        return values.repeat_interleave(count // len(values))
    return values.unflatten(0, (count, -1)).mean(1)


def sizes_of(factors: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """The least and largest number of each calibration, of all layers and heads."""
    names = {name for layer in factors.values() for name in layer}
    every = {name: [value for layer in factors.values() for value in layer.get(name, ())] for name in sorted(names)}
    return {name: {"least": min(values), "largest": max(values)} for name, values in every.items()}
