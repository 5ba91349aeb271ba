"""Linear attention with decay: the additive recurrence that carries RetNet, GLA, HGRN2, Mamba-2 and their kin."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose, full_precision
from seqtrain.kernels.documents import state_dtype

_DECAY_SHAPES = {1: "H", 3: "B T H", 4: "B T H K"}


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
    Source: MATH.md 1.1; the chunk form is that of GLA (Yang et al. 2023, arXiv 2312.06635, section 4).
    """
    tensors = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V")}
    if log_decay is not None:
        tensors["log_decay"] = (log_decay, _DECAY_SHAPES.get(log_decay.dim(), "B T H K"))
    sizes = check_shapes("linear_attention", tensors)
    check_floating("linear_attention", {name: tensor for name, (tensor, _) in tensors.items()})
    states = check_documents("linear_attention", cu_seqlens, sizes["B"], sizes["T"])
    shape = (states, sizes["H"], sizes["K"], sizes["V"])
    check_state("linear_attention", initial_state, shape, q.device)

    dtype = state_dtype(q.dtype)
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.to(dtype).expand(q.shape[:3])
    run = choose("linear_attention", backend, q.device, single_token=cu_seqlens is None and q.shape[1] == 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q.device):
        return run(q, k, v, log_decay, state, scale, cu_seqlens)
