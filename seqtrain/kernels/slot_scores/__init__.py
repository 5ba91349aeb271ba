"""Queries against keys that are kept in slots which forget: the first of gated slot attention's two passes."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose, full_precision
from seqtrain.kernels.documents import state_dtype

__all__ = ["slot_scores"]


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
    """`S_t = diag(a_t) S_{t-1} + w_t^T k_t`, a row a slot, and `o_t = scale S_t q_t`, a number a slot.

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
    name = "slot_scores"
    tensors = {"q": (q, "B T H K"), "k": (k, "B T H K"), "written": (written, "B T H M")}
    tensors["log_decay"] = (log_decay, "B T H M")
    sizes = check_shapes(name, tensors)
    check_floating(name, {key: tensor for key, (tensor, _) in tensors.items()})
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    shape = (states, sizes["H"], sizes["M"], sizes["K"])
    check_state(name, initial_state, shape, q.device)
    dtype = state_dtype(q.dtype)
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    run = choose(name, backend, q.device, single_token=cu_seqlens is None and q.shape[1] == 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q.device):
        return run(q, k, written, log_decay, state, scale, cu_seqlens)
