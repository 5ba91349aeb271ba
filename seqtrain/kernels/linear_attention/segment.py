"""Linear attention over a sharded sequence: the map of a segment, without its outputs, comes before them.

With `b` the running sum of log decays over the segment's T tokens, the transition is `e^{b_T}`, the update
`sum_j (k_j e^{b_T - b_j})^T v_j`, and the incoming state adds `scale (q_i e^{b_i}) S` to the outputs
(docs/math.md, sections 1.1 and 2).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.segments import AffineSegment, Options


class LinearAttentionSegment(AffineSegment):
    """Outputs from a zero state are computed while the scan runs; the incoming state's part is added to them."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        q, log_decay = tensors[0], _decay(tensors)
        if log_decay is None:
            return None
        return (q.shape[0], q.shape[2], q.shape[3])[: 3 if log_decay.dim() == 4 else 2]

    def transition(self) -> tuple[Tensor | None, Tensor]:
        _, k, v = self.tensors[:3]
        find_map = self.operator.choose(self.backend, k.device, function="find_map")
        with full_precision(k.device):
            return find_map(k, v, self._log_decay())

    def local_output(self) -> None:
        self.out, _ = self.operator(*self.tensors, backend=self.backend, **self.options)

    def add_incoming(self, state: Tensor) -> Tensor:
        q, scale = self.tensors[0], self.options.get("scale")
        read = self.operator.choose(self.backend, q.device, function="read")
        with full_precision(q.device):
            return read(q, self._log_decay(), state, q.shape[3] ** -0.5 if scale is None else scale, self.out)

    def _log_decay(self) -> Tensor | None:
        """`[B,T,H]` or `[B,T,H,K]`, or None."""
        log_decay = _decay(self.tensors)
        return log_decay if log_decay is None or log_decay.dim() > 1 else log_decay.expand(self.tensors[0].shape[:3])


def _decay(tensors: Sequence[Any]) -> Tensor | None:
    return tensors[3] if len(tensors) > 3 else None
