"""The interaction operator of a mixer (Ghodsi 2025, "How Many Heads Make an SSM?", arXiv 2512.15115).

A mixer's output is `y_i = sum_j W_ij(X) x_j`, with blocks `W_ij` that depend on the whole input X through gates,
queries and keys. The interaction rank is the dimension of the span of all blocks. Attention has `W_ij = sum_h p_h(i,j)
V_h`, so its rank is at most the number of heads H; a linear SSM has `W_ij = C A^(i-j) B`, and by the paper's head-count
theorem as many heads are necessary and sufficient for it as its rank. Here the blocks of a real mixer are measured:

* mixing: from the layer's input to what its operator gives (all heads side by side, before norm, gate and projection),
  with everything but the values held fixed. This is what the paper's bounds speak of.
* whole: the Jacobian of the layer, nothing held fixed. Its norms over the distance are the reach of the gradient.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import (
    delay,
    delta_rule,
    diagonal_scan,
    diagonal_system,
    linear_attention,
    short_convolution,
    sink_attention,
    slot_scores,
    softmax_attention,
    tensor_attention,
)
from seqtrain.mixers import WHOLE, Mixer
from seqtrain.parallel.sequence import SequenceContext

# Which of an operator's tensors carry values; the others say how they are mixed. Tensor attention's output is a product
# of two mixed values: either alone is linear.
VALUES: dict[Callable, tuple[int, ...]] = {
    linear_attention: (2,),
    slot_scores: (2,),
    delta_rule: (2,),
    diagonal_scan: (0,),
    diagonal_system: (0,),
    softmax_attention: (2,),
    sink_attention: (2, 4),
    tensor_attention: (3,),
}
# The same for every input, whatever it holds: these belong to the path of the values.
PASSING: tuple[Callable, ...] = (short_convolution, delay)
# Rows of a Jacobian computed at once.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class _Watched(SequenceContext):
    """Holds all of an operator's tensors fixed but its values, and keeps its output, real and flat: `[B,T,O]`."""

    # What runs the operators.
    inner: SequenceContext = WHOLE
    outputs: list[Tensor] = field(default_factory=list)

    def run(
        self, operator: Callable, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        if operator in PASSING:
            return self.inner.run(operator, *tensors, initial_state=initial_state, **options)
        if operator not in VALUES:
            raise ValueError(f"interaction: {operator.__name__} isn't known to be linear in values it is given")
        fixed = [x if x is None or index in VALUES[operator] else x.detach() for index, x in enumerate(tensors)]
        out, state = self.inner.run(operator, *fixed, initial_state=initial_state, **options)
        self.outputs.append(torch.view_as_real(out).flatten(2) if out.is_complex() else out.flatten(2))
        return out, state

    def grouped(self, size: int, past: Tensor | None = None) -> SequenceContext:
        return replace(self, inner=self.inner.grouped(size, past))

    def repeated(self, times: int) -> SequenceContext:
        return replace(self, inner=self.inner.repeated(times))


@dataclass(frozen=True)
class Interaction:
    """What was measured on one input. Ranks count singular values of the stacked blocks.

    `rank`: those above `tolerance` times the largest: the dimension of the span, so the heads needed. `rank_energy`:
    how many hold 99% of the sum of squares. `possible`: the most that this many blocks of this size can have.
    """

    rank: int
    rank_energy: int
    possible: int
    # All singular values over the largest, falling.
    spectrum: tuple[float, ...]
    # Mean Frobenius norm of the whole layer's `d out_i / d x_(i-d)`, by distance d from 0.
    reach: tuple[float, ...]

    @property
    def half_distance(self) -> float:
        """Tokens after which the reach has fallen to half its value at distance 1; infinite where it doesn't fall."""
        start = self.reach[1]
        for distance, norm in enumerate(self.reach[1:], start=1):
            if norm < start / 2:
                return float(distance)
        return math.inf


def mixing_blocks(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """`x: [T,D]` -> the blocks `W_ij` of each operator the mixer runs, `[T,T,O,D]`; those with `j > i` are 0.

    O: the channels of the operator's output, real and imaginary part counted each. Short convolutions and delays are no
    operators here. Raises `ValueError` for an operator that isn't linear in its values (TTT's), and where a mixer runs
    none.
    """

    def mixed(rows: Tensor) -> list[Tensor]:
        watched = _Watched()
        mixer(rows, sequence=watched)
        # A mixer that repeats tokens, as DeltaProduct does, reads at the last copy of each.
        return [out.unflatten(1, (rows.shape[1], -1))[:, :, -1] for out in watched.outputs]

    with torch.no_grad():
        count = len(mixed(x[None]))
    if not count:
        raise ValueError(f"interaction: {type(mixer).__name__} runs no operator over its tokens")
    return [_jacobian(partial(_chosen, mixed, number), x) for number in range(count)]


def _chosen(outputs: Callable[[Tensor], list[Tensor]], number: int, rows: Tensor) -> Tensor:
    return outputs(rows)[number]


def whole_blocks(mixer: Mixer, x: Tensor) -> Tensor:
    """`x: [T,D]` -> the Jacobian of the layer, `[T,T,D,D]`: `d out_i / d x_j` at `[i,j]`."""
    return _jacobian(lambda rows: mixer(rows)[0], x)


def interaction_rank(blocks: Tensor, *, tolerance: float) -> tuple[int, int, Tensor]:
    """`(rank, rank_energy, spectrum)` of blocks `[T,T,O,D]`, as `Interaction` has them; the pairs `j <= i` count."""
    tokens = blocks.shape[0]
    rows, columns = torch.tril_indices(tokens, tokens)
    stacked = blocks[rows, columns].flatten(1)
    values = torch.linalg.svdvals(stacked)
    share = values.square().cumsum(0) / values.square().sum()
    return int((values > tolerance * values[0]).sum()), int((share < 0.99).sum()) + 1, values / values[0]


def interaction(mixer: Mixer, x: Tensor, *, tolerance: float = 1e-9) -> Interaction:
    """Measures a mixer in float64 on one row, `x: [T,D]` with `T >= 2`; the mixer's weights are left as they are."""
    # A copy: the singular values of SSMs fall fast, and float32 would hide most of them.
    mixer = _double(mixer)
    x = x.double()
    operators = mixing_blocks(mixer, x)
    # Where there are several, as MALA's scores and their mean, that of the highest rank.
    found = [interaction_rank(blocks, tolerance=tolerance) for blocks in operators]
    best = max(range(len(found)), key=lambda number: found[number][0])
    rank, energy, spectrum = found[best]
    tokens, _, out, width = operators[best].shape
    norms = whole_blocks(mixer, x).flatten(2).norm(dim=2)
    reach = [norms.diagonal(-distance).mean().item() for distance in range(tokens)]
    possible = min(tokens * (tokens + 1) // 2, out * width)
    return Interaction(rank, energy, possible, tuple(spectrum.tolist()), tuple(reach))


def _double(mixer: Mixer) -> Mixer:
    return copy.deepcopy(mixer).double()


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`d function(x)_i / d x_j` as `[T,T,O,D]`, where `function` maps `[B,T,D]` to `[B,T,O]` row by row."""
    tokens, width = x.shape
    with torch.no_grad():
        channels = function(x[None]).shape[2]
    count, rows = tokens * channels, []
    for start in range(0, count, ROWS_AT_ONCE):
        numbers = torch.arange(start, min(start + ROWS_AT_ONCE, count))
        # Each copy of the input is differentiated for another number of the output.
        copies = x.expand(len(numbers), -1, -1).clone().requires_grad_()
        chosen = function(copies).flatten(1).gather(1, numbers[:, None])
        rows.append(torch.autograd.grad(chosen.sum(), copies)[0])
    return torch.cat(rows).view(tokens, channels, tokens, width).transpose(1, 2)
