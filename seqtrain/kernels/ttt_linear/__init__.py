"""TTT-Linear: a memory that is a linear model with a LayerNorm, trained on each token while the sequence is read."""

from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.operator import operator


@operator(
    arguments={
        **dict.fromkeys(("q", "k", "v"), "B T H K"),
        "rate": "B T H",
        "start": "H K+1 K",
        "norm_weight": "H K",
        "norm_bias": "H K",
        "shares": "C",
    },
    out="B T H K",
    state=lambda *, H, K, **_: (H, 2 * K + 3, K),
    # The inner model's answers to k and to q, and the gradient's outer product.
    flops=lambda *, B, T, H, K, **_: 6 * B * T * H * (K + 1) * K,
    backends=("reference", "chunked"),
)
def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    start: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    shares: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`out_t = f(q_t; W_t)`, where `f(x; W) = x + LN([x, 1] W)` learns `f(k_s) = v_s` from the tokens s <= t.

    Tokens come in mini-batches of C, C the number of `shares`. Gradients `g_s` of `|f(k_s; W) - v_s|^2 / 2` in W are
    all taken at W as it was before s's mini-batch; `W_t = W - shares[c] * sum_s rate_s g_s` over the mini-batch's
    tokens up to t, its c-th from 0. After its last token W_t is the next one's W.

    q, k, v: `[B,T,H,K]`, floating. rate: `[B,T,H]`, at least 0. start: `[H,K+1,K]`, each head's first W, its last row
    the bias. norm_weight, norm_bias: `[H,K]`, of the LayerNorm. shares: `[C]`, at least 0. The last four are
    learned: one for all tokens.
    initial_state: `[B,H,2K+3,K]`, or `[N,...]` under `cu_seqlens`; zeros where None. W less `start` (K+1 rows), the sum
        of the unfinished mini-batch's `rate_s g_s` (K+1 rows), and how many tokens it has (1 row).
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked" or "reference".

    Returns `(out, final_state)`: out `[B,T,H,K]` in v's dtype; the state float32 (float64 for float64 inputs).
    Differentiable in every tensor. The state is no affine function of the state before: sequence-parallel ranks
    take turns. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: Sun et al. 2024 (arXiv 2407.04620), sections 2.4 to 2.7.
    """
    tensors = (q, k, v, rate, start, norm_weight, norm_bias, shares)
    call = ttt_linear.prepare(tensors, backend, initial_state, cu_seqlens)
    start, norm_weight, norm_bias, shares = (x.to(call.state.dtype) for x in tensors[4:])
    learned = (start, norm_weight[:, None], norm_bias[:, None], shares)
    with full_precision(q.device):
        return call.run((q, k, v, rate, *learned), call.state, cu_seqlens)
