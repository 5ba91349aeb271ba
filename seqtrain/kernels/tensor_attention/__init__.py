"""Tensor (Kronecker) attention: third-order attention as two linear recurrences."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose, full_precision
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.tensor_attention import exact
from seqtrain.kernels.tensor_attention.features import feature_count

# Of the polynomial that stands for exp.
DEGREE = 2

__all__ = ["DEGREE", "feature_count", "tensor_attention"]


def tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    degree: int | None = DEGREE,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`o_t = sum_{i,j<=t} p_t(i,j) v1_i * v2_j`: attention over pairs of tokens, causal in both.

    `p_t(i,j)` is in proportion to `exp(scale * sum_r q_tr k1_ir k2_jr)`; exp is replaced by its Taylor polynomial of
    even `degree`, which makes the cost linear in T (MATH.md 1.4); the weights are within `1 +- e^R R^(degree+1) /
    (degree+1)!` of the exact ones while the exponent stays within [-R, R]. `degree=None` is exact and cubic in T: for
    small T, without a state.

    `q, k1, k2`: `[B,T,H,K]`, `v1, v2`: `[B,T,H,V]`, floating; keep K small, for there are `F = feature_count(K,
    degree)` features. `scale` defaults to `K ** -0.5`. `cu_seqlens`: int `[N+1]`, document boundaries of a packed row
    (then B == 1).
    `initial_state`: `[B,H,2,F,V+1]` (zeros when None), `[N,...]` with documents: the two sums of `phi(k)^T [v, 1]`.

    Returns `out`, `[B,T,H,V]` in v1's dtype, and the final state, float32 (float64 for float64 inputs); None for
    `degree=None`. Raises `ValueError` for a wrong shape, dtype, device, degree or backend.
    """
    name = "tensor_attention"
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    sizes = check_shapes(
        name, {key: (value, f"B T H {'V' if key[0] == 'v' else 'K'}") for key, value in tensors.items()}
    )
    check_floating(name, tensors)
    if degree is not None and (degree < 0 or degree % 2):
        raise ValueError(
            f"{name}: degree={degree}, expected an even number (its polynomial is positive everywhere) or None"
        )
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    if scale is None:
        scale = sizes["K"] ** -0.5
    dtype = state_dtype(*(tensor.dtype for tensor in tensors.values()))
    if degree is None:
        if initial_state is not None:
            raise ValueError(
                f"{name}: initial_state given with degree=None, which has no state of constant size; pass None"
            )
        return exact.run((q, k1, k2, v1, v2), scale, dtype, cu_seqlens), None
    shape = (states, sizes["H"], 2, feature_count(sizes["K"], degree), sizes["V"] + 1)
    check_state(name, initial_state, shape, q.device)
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    run = choose(name, backend, q.device, single_token=sizes["T"] == 1 and cu_seqlens is None)
    with full_precision(q.device):
        out, final = run((q, k1, k2, v1, v2), degree, scale, state, cu_seqlens)
    return out.to(v1.dtype), final
