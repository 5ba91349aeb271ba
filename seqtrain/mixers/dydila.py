"""DyDiLA, dynamic differential linear attention (2026, arXiv 2601.13683, section 3.1), in causal form.

Three corrections against weights that are too smooth. Each token chooses, by the largest score of a small router,

* one of several projections that make, next to its query and key, what is redundant in them (dynamic projection);
* the power that sharpens the direction of each of these four, `relu(z)^p` at the length of relu(z) (dynamic measure);
* how much of what is redundant is taken away from the query and from the key (token differential):
  `o_t = sum_j ((q_t - a_t q'_t) . (k_j - b_j k'_j)) v_j`.

A choice passes gradients to its router as a softmax's mean would. Routers read the layer's input, where the paper's
read the projected tokens, and stay out of autocast: a choice must not depend on how a product was rounded. Differences
make weights of either sign, which no sum can divide: heads are normalised by their root mean square.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import linear_attention
from seqtrain.kernels.dispatch import full_precision
from seqtrain.layers import HeadNorm, Linear, fused, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import LinearMixer

# What tokens choose: projections of q' and k', powers of q, q', k and k', and the shares of q' and k' taken away.
PROJECTIONS, POWERS, SHARES = 2, 4, 2


def choice(scores: Tensor) -> Tensor:
    """1 at the largest of the last dimension, 0 elsewhere; its gradient is softmax's (a straight-through estimator)."""
    soft = scores.softmax(-1)
    hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft.dtype)
    # In this order the soft part cancels exactly.
    return hard + (soft - soft.detach())


def sharpened(z: Tensor, power: Tensor) -> Tensor:
    """`relu(z)^power` at the length of `relu(z)`; `z: [...,K]`, `power: [...,1]` at least 1."""
    z = F.relu(upcast(z))
    # Relative to the largest entry, so that no power overflows.
    raised = (z / z.amax(-1, keepdim=True).clamp(min=1e-6)) ** power
    return raised * (_length(z) / _length(raised))


def _length(z: Tensor) -> Tensor:
    return (z.square().sum(-1, keepdim=True) + 1e-12).sqrt()


class DyDiLA(LinearMixer):
    """Linear attention between differences of tokens and of what is redundant in them, as each token chooses."""

    class Config(LinearMixer.Config):
        # Projections among which a token chooses one for q' and one for k'; all are computed.
        projections: Annotated[int, Field(gt=0, le=16)] = 3
        # Learned powers, and learned shares, among which a token chooses.
        factors: Annotated[int, Field(gt=0, le=64)] = 9
        # The powers' initial value.
        power: Annotated[float, Field(ge=1, le=8)] = 3.0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        rows = 2 * config.projections * shape.heads * (self.key,)
        parts = 2 * config.projections * (shape.heads * self.key,)
        self.redundant = fused(Linear(shape.width, sum(rows), bias=False), rows, parts)
        self.routes = PROJECTIONS * [config.projections] + (POWERS + SHARES) * [config.factors]
        self.router = Linear(shape.width, sum(self.routes), bias=False)
        self.powers = nn.Parameter(torch.empty(POWERS * config.factors))
        self.shares = nn.Parameter(torch.empty(SHARES * config.factors))
        self.norm = HeadNorm(self.value)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        """Powers of `power`, and shares of a hundredth, as in the paper; powers are learned as what exceeds 1."""
        return {self.powers: constant(self.config.power - 1), self.shares: constant(0.01)}

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        with full_precision(x.device):
            scores = self.router(x.to(self.router.weight.dtype))
        routes = [choice(part) for part in upcast(scores).split(self.routes, 2)]
        candidates = self.redundant(x).unflatten(2, (2, self.config.projections, self.shape.heads, self.key)).unbind(2)
        other_q, other_k = (
            (parts * route[..., None, None]).sum(2) for parts, route in zip(candidates, routes[:2], strict=True)
        )
        powers = (1 + F.relu(power) for power in self._factors(routes[2:6], self.powers))
        q, other_q, k, other_k = (
            sharpened(z, power) for z, power in zip((q, other_q, k, other_k), powers, strict=True)
        )
        share_q, share_k = self._factors(routes[6:], self.shares)
        q, k = q - share_q * other_q, k - share_k * other_k
        out, after["memory"] = sequence.run(linear_attention, q, k, v, initial_state=past.get("memory"))
        return self.out(self.norm(out).to(x.dtype)), after

    @staticmethod
    def _factors(routes: list[Tensor], learned: Tensor) -> list[Tensor]:
        """The chosen number of each route `[B,T,n]`, `[B,T,1,1]`."""
        parts = zip(routes, learned.chunk(len(routes)), strict=True)
        return [(route * numbers).sum(-1)[..., None, None] for route, numbers in parts]
