"""The delta rule over a sharded sequence: one pass gives a segment's outputs, its map, and how both depend on the past.

The rule is linear in values and state together. So values that are zero, from a state that is the identity, give as
final state the transition M and as outputs the matrix R that reads an incoming state: `out = out_0 + R S`. These
K columns go next to the V columns of the values through the same pass, which shares all but its products with columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.segments import AffineSegment, Options


class DeltaRuleSegment(AffineSegment):
    """All of it is done to find the map; what is left for the incoming state is one matrix product."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        batch, _, heads, key = tensors[0].shape
        return batch, heads, key, key

    def transition(self) -> tuple[Tensor | None, Tensor]:
        q, k, v, *rest = self.tensors
        batch, _, heads, key = q.shape
        width, dtype = v.shape[3], self.state_dtype
        # Not in v's dtype: M and R are read with a state of the state's dtype.
        columns = torch.cat([v.to(dtype), v.new_zeros(*v.shape[:3], key, dtype=dtype)], 3)
        state = torch.eye(key, key + width, dtype=dtype, device=v.device).roll(width, 1)
        out, final = self.operator(
            q,
            k,
            columns,
            *rest,
            initial_state=state.expand(batch, heads, -1, -1),
            backend=self.backend,
            **self.options,
        )
        self.out, self.read = out.split([width, key], 3)
        update, transition = final.split([width, key], 3)
        return transition, update

    def add_incoming(self, state: Tensor) -> Tensor:
        with full_precision(state.device):
            return (self.out + torch.einsum("bthk,bhkv->bthv", self.read, state)).to(self.tensors[2].dtype)
