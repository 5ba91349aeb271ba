"""Tensor attention over a sharded sequence: two sums of features and values; the outputs are products of both sums.

The state has no decay, so a segment's map only adds. Its outputs are not linear in the state: they wait for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.segments import AffineSegment, Options
from seqtrain.kernels.tensor_attention.features import DEGREE, features

# Tokens whose features are held at once: F of them stand for K numbers.
TOKENS = 4096


class TensorAttentionSegment(AffineSegment):
    """The sums are found first, from features that are not kept; the rest is the operator itself."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return None

    def transition(self) -> tuple[Tensor | None, Tensor]:
        _, k1, k2, v1, v2 = self.tensors
        shape, dtype = self.operator.state_shape(self.tensors, self.options, self.tensors[0].shape[0])
        degree = self.options.get("degree", DEGREE)
        sums = []
        with full_precision(k1.device):
            for k, v in ((k1, v1), (k2, v2)):
                total = torch.zeros(shape[:2] + shape[3:], dtype=dtype, device=k.device)
                # One turn at least, so that gradients find their way on a rank without tokens, too.
                for start in range(0, max(k.shape[1], 1), TOKENS):
                    rows = slice(start, start + TOKENS)
                    part = checkpoint(_sums, k[:, rows], v[:, rows], degree, dtype, use_reentrant=False)
                    total = total + part
                sums.append(total)
        return None, torch.stack(sums, 2)

    def add_incoming(self, state: Tensor) -> Tensor:
        out, _ = self.operator(*self.tensors, initial_state=state, backend=self.backend, **self.options)
        return out


def _sums(k: Tensor, v: Tensor, degree: int, dtype: torch.dtype) -> Tensor:
    """`sum_t phi(k_t)^T [v_t, 1]`: `[B,T,H,K]`, `[B,T,H,V]` -> `[B,H,F,V+1]`."""
    rows = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], 3)
    return torch.einsum("bthf,bthv->bhfv", features(k.to(dtype), degree), rows)
