"""Queries against keys that are kept in slots which forget: the first of gated slot attention's two passes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_token
from seqtrain.kernels.linear_attention import LinearAttentionSegment, linear_attention
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, Options

__all__ = ["slot_scores"]


class SlotScoresSegment(LinearAttentionSegment):
    """The map of a segment is that of linear attention, read along its other side."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return LinearAttentionSegment.transition_shape(_writing(tensors), options)

    def transition(self) -> tuple[Tensor | None, Tensor]:
        return linear_attention.segment(_writing(self.tensors), self.options, self.backend).transition()

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


@operator(
    arguments={"q": "B T H K", "k": "B T H K", "written": "B T H M", "log_decay": "B T H M"},
    out="B T H M",
    state=lambda *, H, M, K, **_: (H, M, K),
    flops=lambda *, B, T, H, K, M, **_: 4 * B * T * H * K * M,
    backends=("reference", "chunked"),
    time=AffineScan(SlotScoresSegment),
)
def slot_scores(
    q: Tensor,
    k: Tensor,
    written: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(a_t) S_{t-1} + w_t^T k_t`, one row per slot, and `o_t = scale S_t q_t`, one number per slot.

    The state is that of `linear_attention(., w, k, log_decay)`; it is read along its other side. So every pair of a
    query and a key is multiplied once for all slots.
    q, k: `[B,T,H,K]`, floating. written: w, `[B,T,H,M]`, floating. log_decay: `log a_t <= 0`, `[B,T,H,M]`, not -inf.
    scale: factor of the output; `K ** -0.5` where None.
    initial_state: `[B,H,M,K]`, or `[N,H,M,K]` under `cu_seqlens`; zeros where None.
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked" or "reference".

    Returns `(out, final_state)`: out `[B,T,H,M]` in q's dtype; final_state `[B or N,H,M,K]`, float32 (float64 for
    float64 inputs). Differentiable in every tensor. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: GSA (Zhang et al. 2024, arXiv 2409.07146, eq. 6).
    """
    tensors = (q, k, written, log_decay)
    call = slot_scores.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale)
    with full_precision(q.device):
        return call.run(tensors, call.state, cu_seqlens, call.scale)


@slot_scores.backend(like=lambda inputs, state: inputs[2].to(inputs[0].dtype))
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition: one token after the other."""

    def step(q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        query, key, taken = (x.to(state.dtype) for x in (q, k, written))
        state = state * log_decay.to(state.dtype).exp()[..., None] + taken[..., None] * key[:, :, None]
        return scale * (state @ query[..., None])[..., 0], state

    out, state = by_token(step, inputs, state, cu_seqlens, like=inputs[2])
    return out.to(inputs[0].dtype), state
