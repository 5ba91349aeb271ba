"""Training without a backward pass: two forward passes with weights to either side, along one random direction.

MeZO (arXiv 2305.17333): the difference of the two losses is the gradient's part along the direction, which a seed gives
again. A row runs in pieces with its state carried on (as ZO2, arXiv 2503.12668, streams a model's blocks), so that what
is held does not grow with its length. What a step sees is exact in one direction of many: it suits few weights, such as
gates.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.losses import known
from seqtrain.data import Batch
from seqtrain.mixers import WHOLE
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.segmented import Segment, carried, cut


def two_sided(
    pieces: Iterable[Callable[[int], Tensor]], weights: Sequence[Tensor], seed: int, epsilon: float
) -> Tensor:
    """The summed loss of `pieces`, with its gradient by `weights` estimated along one direction that `seed` decides.

    Each of `pieces` is called for side 0 and for side 1, to which the weights have been moved then, by `epsilon`, and
    gives a scalar. They are what they were when it returns.
    """
    with torch.no_grad():
        before = [weight.clone() for weight in weights]
        directions = _directions(weights, seed)
        values: list[Any] = [0.0, 0.0]
        for piece in pieces:
            for side, sign in enumerate((epsilon, -epsilon)):
                for weight, old, direction in zip(weights, before, directions, strict=True):
                    torch.add(old, direction, alpha=sign, out=weight)
                values[side] = values[side] + piece(side)
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        slope = (values[0] - values[1]) / (2 * epsilon)
        gradients = [slope.to(direction) * direction for direction in directions]
    return known((values[0] + values[1]) / 2, weights, gradients)


def _directions(weights: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]


def seed_of(tokens: Tensor) -> int:
    """Follows from the tokens alone: a step that is done again, on any rank, takes the same direction."""
    return zlib.crc32(tokens.cpu().numpy().tobytes())


def pieces(tokens: Tensor, labels: Tensor, sequence: SequenceContext, size: int) -> list[Segment]:
    """The packed row `tokens`, `labels: int64 [1,T]` as consecutive pieces of at most `size` tokens; 0: one."""
    length = tokens.shape[1]
    if not size or size >= length:
        return [Segment(tokens, labels, sequence)]
    starts = torch.tensor([0, length], dtype=torch.int32) if sequence.cu_seqlens is None else sequence.cu_seqlens
    offsets = (*range(0, length, size), length)
    return cut(Batch(tokens, labels, offsets, starts.cpu()), group=None, backend=sequence.backend)


class Streamed:
    """A model's last hidden states of one piece after the other."""

    def __init__(self, model: Any):
        self.model = model
        self.state: Any = None

    def hidden(self, piece: Segment) -> Tensor:
        """Of the next piece, `[1,T,D]`."""
        sequence = piece.sequence or WHOLE
        found, state = self.model.hidden(piece.tokens, self.state, sequence=sequence)
        self.state = carried(state, None)
        return found
