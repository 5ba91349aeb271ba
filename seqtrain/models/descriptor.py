"""What a point knows of those around it before layers read points one after the other (LION, arXiv 2407.18232)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize, normal
from seqtrain.layers import Linear, RMSNorm
from seqtrain.parallel.sequence import ContinuedSequence, SequenceContext
from seqtrain.parallel.sharded import ShardedSequence

# The places around a point, its own first.
AROUND = sorted(itertools.product((-1, 0, 1), repeat=3), key=lambda step: sum(map(abs, step)))


class SpatialDescriptor(nn.Module):
    """`x + gelu(norm(W sum_d w_d * x_{p+d}))` over the points p + d of a document, d of the 27 steps to and around p.

    A submanifold convolution: it is at points alone. The paper's has a matrix a step; here each has a weight a channel,
    and one matrix follows. Tokens are points of a grid of `side` points along each axis by their ids, x first; other
    ids are none. `causal`: points that come later in the sequence count for nothing.
    """

    def __init__(self, width: int, side: int, *, causal: bool):
        super().__init__()
        self.side, self.causal = side, causal
        # One-dimensional, so that weight decay skips them.
        self.steps = nn.Parameter(torch.empty(len(AROUND) * width))
        self.mix = Linear(width, width, bias=False)
        self.norm = RMSNorm(width)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.steps: normal(len(AROUND) ** -0.5), self.norm.weight: constant(1.0)}

    def forward(self, x: Tensor, tokens: Tensor, sequence: SequenceContext) -> Tensor:
        """`x: [B,T,D]` of `tokens: int64 [B,T]` -> the same. Raises `ValueError` where not all of a row is here."""
        if isinstance(sequence, ShardedSequence | ContinuedSequence) or tokens.dim() != 2:
            raise ValueError(
                "model.descriptor: looks for a point's neighbors in its row; use parallel.sequence=1, no segments"
            )
        weights = self.steps.view(len(AROUND), -1)
        found, total = self.neighbors(tokens, sequence), torch.zeros_like(x)
        for weight, place in zip(weights, found, strict=True):
            there = place >= 0
            rows = x.gather(1, place.clamp(min=0)[..., None].expand_as(x)) * there[..., None]
            total = total + rows * weight.to(x.dtype)
        return x + F.gelu(self.norm(self.mix(total)))

    @torch.no_grad()
    def neighbors(self, tokens: Tensor, sequence: SequenceContext) -> list[Tensor]:
        """For each of `AROUND` the place in the row of the point there, int64 `[B,T]`, -1 where there is none."""
        side, (batch, count) = self.side, tokens.shape
        index = torch.arange(count, device=tokens.device).expand(batch, count)
        document = torch.zeros_like(index)
        if sequence.cu_seqlens is not None:
            ends = sequence.cu_seqlens.to(device=tokens.device, dtype=torch.int64)
            document = torch.searchsorted(ends, index.contiguous(), right=True) - 1
        points = side**3
        point = tokens < points
        # Where each document has each point; other tokens' go into a place of their own.
        table = torch.full((batch, int(document.max()) * points + points + 1), -1, device=tokens.device)
        table.scatter_(1, torch.where(point, document * points + tokens, table.shape[1] - 1), index)
        x, y, z = tokens // (side * side), tokens // side % side, tokens % side
        found = []
        for step in AROUND:
            near = [axis + move for axis, move in zip((x, y, z), step, strict=True)]
            inside = torch.stack([(axis >= 0) & (axis < side) for axis in near]).all(0) & point
            key = document * points + (near[0] * side + near[1]) * side + near[2]
            place = table.gather(1, key.where(inside, 0)).where(inside, -1)
            found.append(place.where(place <= index, -1) if self.causal else place)
        return found
