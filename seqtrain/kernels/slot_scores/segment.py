"""Slot scores over a sharded sequence: the map of a segment is that of linear attention, read along its other side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.linear_attention import linear_attention
from seqtrain.kernels.linear_attention.segment import LinearAttentionSegment
from seqtrain.kernels.segments import AffineSegment, Options


class SlotScoresSegment(AffineSegment):
    """Outputs from a zero state are computed while the scan runs; the incoming state's part is added to them."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return LinearAttentionSegment.transition_shape(_writing(tensors), options)

    def transition(self) -> tuple[Tensor | None, Tensor]:
        return linear_attention.segment(_writing(self.tensors), self.options, self.backend).transition()

    def local_output(self) -> None:
        self.out, _ = self.operator(*self.tensors, backend=self.backend, **self.options)

    def add_incoming(self, state: Tensor) -> Tensor:
        q, log_decay = (self.tensors[index].to(state.dtype) for index in (0, 3))
        scale = self.options.get("scale")
        with full_precision(q.device):
            read = torch.einsum("bthk,bhmk->bthm", q, state * (q.shape[3] ** -0.5 if scale is None else scale))
            return self.out + (read * log_decay.cumsum(1).exp()).to(self.out.dtype)


def _writing(tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The arguments of the linear attention with the same state, which knows nothing of its queries: w stands there."""
    _, k, written, log_decay = tensors
    return written, written, k, log_decay
