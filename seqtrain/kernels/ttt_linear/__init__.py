"""TTT-Linear: a memory that is a linear model with a LayerNorm, trained on each token while the sequence is read."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose, full_precision
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.ttt_linear.inner import InnerModel


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

    q, k, v: `[B,T,H,K]`, floating. rate: `[B,T,H]`, at least 0. start: `[H,(K+1)*K]`, each head's first W, its last K
    numbers the bias. norm_weight, norm_bias: `[H*K]`, of the LayerNorm. shares: `[C]`, at least 0. The last four are
    learned: one for all tokens.
    initial_state: `[B,H,2K+3,K]`, or `[N,...]` under `cu_seqlens`; zeros where None. W less `start` (K+1 rows), the sum
        of the unfinished mini-batch's `rate_s g_s` (K+1 rows), and how many tokens it has (1 row).
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked" or "reference".

    Returns `(out, final_state)`: out `[B,T,H,K]` in v's dtype; the state float32 (float64 for float64 inputs).
    Differentiable in every tensor. The state is no affine function of the state before: ranks that share a sequence
    take turns. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: Sun et al. 2024 (arXiv 2407.04620), sections 2.4 to 2.7.
    """
    tensors = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H K"), "rate": (rate, "B T H")}
    sizes = check_shapes("ttt_linear", tensors | {"shares": (shares, "C")})
    heads, key = sizes["H"], sizes["K"]
    learned: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "start": (start, (heads, (key + 1) * key)),
        "norm_weight": (norm_weight, (heads * key,)),
        "norm_bias": (norm_bias, (heads * key,)),
    }
    for name, (tensor, expected) in learned.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"ttt_linear: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    check_floating("ttt_linear", {name: tensor for name, (tensor, _) in tensors.items()})
    states = check_documents("ttt_linear", cu_seqlens, sizes["B"], sizes["T"])
    shape = (states, heads, 2 * key + 3, key)
    check_state("ttt_linear", initial_state, shape, q.device)

    dtype = state_dtype(q.dtype)
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    run = choose("ttt_linear", backend, q.device, single_token=cu_seqlens is None and sizes["T"] == 1)
    weight, bias = (x.to(dtype).view(heads, 1, key) for x in (norm_weight, norm_bias))
    model = InnerModel(start.to(dtype).view(heads, key + 1, key), weight, bias, shares.to(dtype))
    with full_precision(q.device):
        return run((q, k, v, rate), model, state, cu_seqlens)
