"""The diagonal scan over a sharded sequence: the incoming state, decayed, adds to every output (docs/math.md, 2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.segments import AffineSegment, Options


class DiagonalScanSegment(AffineSegment):
    """The scan from zero gives the update; how far the incoming state decays is found while it is on its way."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        x = tensors[0]
        return x.shape[0], x.shape[2]

    def transition(self) -> tuple[Tensor | None, Tensor]:
        x, log_a = self.tensors
        self.out, update = self.operator(x, log_a, backend=self.backend, **self.options)
        log_a = log_a.to(update.dtype)
        # Contiguous, since the order of a sum depends on strides, and bits are to depend on numbers alone.
        total = log_a.contiguous().sum(1) if log_a.dim() == 3 else (log_a * x.shape[1]).expand(x.shape[0], -1)
        return total.exp(), update

    def local_output(self) -> None:
        x, log_a = self.tensors
        log_a = log_a.to(self.state_dtype)
        if log_a.dim() == 3:
            self.factor = log_a.cumsum(1).exp()  # B T D
        else:
            tokens = torch.arange(1, x.shape[1] + 1, dtype=log_a.real.dtype, device=x.device)
            self.factor = (tokens[:, None] * log_a).exp()  # T D

    def add_incoming(self, state: Tensor) -> Tensor:
        return self.out + (self.factor * state[:, None]).to(self.out.dtype)
