"""Linear-InfSA, the linear form of Infinite Self-Attention: all tokens read what is central in their document.

Attention scores `relu(Q K^T)` are a graph; its principal eigenvector says how central each token is. It is approached
by the mean query's scores, so that neither the graph nor a state longer than a head is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.layers import HeadProjections, upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.parallel.both_ways import BothWays

# Below this a sum of scores is taken to be this: where the mean query points away from all keys they are zero.
SMALLEST = 1e-6


def centrality(q: Tensor, k: Tensor) -> Tensor:
    """`relu(mean(q) . k_j)` over its sum: `q, k: [B,T,H,K]` -> `[B,T,H]`, of one document."""
    score = F.relu(torch.einsum("bhk,bthk->bth", q.mean(1), k))
    return score / score.sum(1, keepdim=True).clamp(min=SMALLEST)


class LinearInfSA(Mixer):
    """`out_t = sum_j a_j v_j`, the same for all t; `a_j = relu(mean(q) . k_j) / sum_i relu(mean(q) . k_i)`."""

    causal = False

    class Config(MixerConfig):
        pass

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.qkv = HeadProjections(shape.width, shape.heads, 3 * (self.part_of_width(),))
        self.out = self.output(shape.channels)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        assert isinstance(sequence, BothWays)
        (q, k, v), _ = self.qkv(x, None, sequence)
        q, k, v = upcast(q), upcast(k), upcast(v)
        pieces = sequence.pieces()
        # The sum of the queries is as good as their mean: a sum of scores divides.
        queries = sequence.totals([q[:, piece].sum(1) for piece in pieces])
        scores = [
            F.relu(torch.einsum("bhk,bthk->bth", query, k[:, piece]))
            for query, piece in zip(queries, pieces, strict=True)
        ]
        columns = F.pad(v, (0, 1), value=1.0)
        sums = sequence.totals(
            [
                torch.einsum("bth,bthv->bhv", score, columns[:, piece])
                for score, piece in zip(scores, pieces, strict=True)
            ]
        )
        read = [total[..., :-1] / total[..., -1:].clamp(min=SMALLEST) for total in sums]
        counts = [score.shape[1] for score in scores]
        outs = [each[:, None].expand(-1, count, -1, -1) for each, count in zip(read, counts, strict=True)]
        return self.out(torch.cat(outs, 1).flatten(2).to(x.dtype)), {}
