"""Gated DeltaProduct (2025, arXiv 2502.10297): several delta-rule steps per token, so richer turns of the state."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seqtrain.kernels import delta_rule
from seqtrain.layers import l2norm
from seqtrain.mixers.common.delta import DeltaInputs
from seqtrain.mixers.gated_delta_net import GatedDeltaNet
from seqtrain.parallel.sequence import SequenceContext


class DeltaProduct(GatedDeltaNet):
    """Gated DeltaNet whose tokens write n keys and values, each correcting what the one before left.

    A token's transition is `a_t` times a product of n generalised Householder matrices `I - beta k^T k`; with beta up
    to 2 two of them make any rotation in a plane. To the operator it is a sequence n times as long: the decay comes
    with a token's first step, the query with its last.
    """

    # Several steps per token come from projections that an attention layer does not have.
    recurrence = None

    class Config(GatedDeltaNet.Config):
        # Steps, so keys and values, per token; 1 is Gated DeltaNet.
        steps: Annotated[int, Field(gt=0, le=8)] = 2
        # True: beta in [0, 2], so that a state can change its sign (arXiv 2411.12537); False: in [0, 1].
        allow_negative_eigenvalues: bool = True

    @property
    def steps(self) -> int:
        return self.config.steps

    def recur(self, inputs: DeltaInputs, past: Tensor | None, sequence: SequenceContext) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_decay = inputs
        assert log_decay is not None
        k, v = (x.unflatten(3, (self.steps, -1)).transpose(2, 3) for x in (k, v))  # B T steps H K
        beta = beta.unflatten(2, (-1, self.steps)).transpose(2, 3)  # B T steps H
        q = F.pad(q[:, :, None], (0, 0, 0, 0, self.steps - 1, 0))
        log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, self.steps - 1))
        q, k, *others = (x.flatten(1, 2) for x in (q, l2norm(k), v, beta, log_decay))
        out, state = sequence.repeated(self.steps).run(delta_rule, q, self.shared(k), *others, initial_state=past)
        return out[:, self.steps - 1 :: self.steps], state
