"""Diagonal systems over a sharded sequence: the incoming state, decayed, is read out and added to the outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.diagonal_system.chunked import decayed_reading
from seqtrain.kernels.segments import AffineSegment, Options


class DiagonalSystemSegment(AffineSegment):
    """The outputs from a zero state come with the update."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return tensors[0].shape[0], tensors[1].numel()

    def transition(self) -> tuple[Tensor | None, Tensor]:
        u, log_a = self.tensors[:2]
        self.out, update = self.operator(*self.tensors, backend=self.backend, **self.options)
        total = (log_a.to(torch.complex128).flatten() * u.shape[1]).exp().to(update.dtype)
        return total.expand(u.shape[0], -1), update

    def add_incoming(self, state: Tensor) -> Tensor:
        u, log_a, _, read = self.tensors
        if u.shape[1] == 0:
            return self.out
        return self.out + decayed_reading(log_a, read.to(state.dtype), state, u.shape[1]).to(self.out.dtype)
