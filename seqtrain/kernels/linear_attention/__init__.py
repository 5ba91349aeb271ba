"""Linear attention with decay: the additive recurrence that carries RetNet, GLA, HGRN2, Mamba-2 and their kin."""

from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.linear_attention.segment import LinearAttentionSegment
from seqtrain.kernels.operator import operator
from seqtrain.kernels.segments import AffineScan


@operator(
    arguments={"q": "B T H K", "k": "B T H K", "v": "B T H V", "log_decay": ("H", "B T H", "B T H K")},
    out="B T H V",
    state=lambda *, H, K, V, **_: (H, K, V),
    # The update `k^T v` and the reading `q S`.
    flops=lambda *, B, T, H, K, V, **_: 4 * B * T * H * K * V,
    backends=("reference", "chunked", "native", "triton"),
    time=AffineScan(LinearAttentionSegment),
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay: `S_t = diag(a_t) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t`.

    q, k: `[B,T,H,K]`, floating. v: `[B,T,H,V]`, floating.
    log_decay: `log a_t <= 0`, natural logarithm; None (no decay), `[H]`, `[B,T,H]` or `[B,T,H,K]`. -inf is not allowed:
        a very negative number (-1e4) forgets as well.
    scale: factor of the output; `K ** -0.5` where None.
    initial_state: `[B,H,K,V]`, or `[N,H,K,V]` under `cu_seqlens`; zeros where None.
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked", "reference", "triton" or "native".

    Returns `(out, final_state)`: out `[B,T,H,V]` in v's dtype; final_state `[B or N,H,K,V]`, float32 (float64 for
    float64 inputs). Differentiable in every tensor. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: docs/math.md, section 1.1; the chunk form is that of GLA (Yang et al. 2023, arXiv 2312.06635, section 4).
    """
    tensors = (q, k, v, log_decay)
    call = linear_attention.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.to(call.state.dtype).expand(q.shape[:3])
    with full_precision(q.device):
        return call.run(q, k, v, log_decay, call.state, call.scale, cu_seqlens)
