"""The delta rule with decay: the recurrence of DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose, full_precision
from seqtrain.kernels.documents import state_dtype


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    read: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Delta rule: `S_t = (I - beta_t k_t^T k_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t`, `o_t = scale q_t S_t`.

    q, k: `[B,T,H,K]`, floating; the recurrence is stable for keys of norm at most 1 (the mixer normalises them).
    v: `[B,T,H,V]`, floating. beta: `[B,T,H]`, in [0, 1], or [0, 2] for negative eigenvalues.
    log_decay: `log a_t <= 0`, natural logarithm; None (DeltaNet), `[B,T,H]` (Gated DeltaNet) or `[B,T,H,K]` (KDA);
        finite: a very negative number (-1e4) forgets as well as -inf would.
    read, erase: `[B,T,H,K]`, floating, both or neither; k where None. The vector the decayed state is asked with, and
        the one its answer is taken away along: `S_t = (I - beta_t erase_t^T read_t) diag(a_t) S_{t-1} + beta_t k_t^T
        v_t` (RWKV-7). Stable where `|1 - beta_t read_t . erase_t| <= 1` and both are parallel, or nearly.
    scale: factor of the output; `K ** -0.5` where None.
    initial_state: `[B,H,K,V]`, or `[N,H,K,V]` under `cu_seqlens`; zeros where None.
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked", "reference", "triton" or "native"; with `read` and `erase` one of the first three.

    Returns `(out, final_state)`: out `[B,T,H,V]` in v's dtype; final_state `[B or N,H,K,V]`, float32 (float64 for
    float64 inputs). Differentiable in every tensor. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: MATH.md 1.2; the chunk form is that of Yang et al. 2024 (arXiv 2406.06484, 2412.06464).
    """
    tensors = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "beta": (beta, "B T H")}
    if log_decay is not None:
        tensors["log_decay"] = (log_decay, "B T H" if log_decay.dim() == 3 else "B T H K")
    vectors = _vectors(read, erase)
    tensors |= {name: (tensor, "B T H K") for name, tensor in vectors.items()}
    sizes = check_shapes("delta_rule", tensors)
    check_floating("delta_rule", {name: tensor for name, (tensor, _) in tensors.items()})
    states = check_documents("delta_rule", cu_seqlens, sizes["B"], sizes["T"])
    shape = (states, sizes["H"], sizes["K"], sizes["V"])
    check_state("delta_rule", initial_state, shape, q.device)

    dtype = state_dtype(q.dtype)
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if vectors:
        backend = _wide_backend(backend)
    run = choose("delta_rule", backend, q.device, single_token=cu_seqlens is None and q.shape[1] == 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q.device):
        return run(q, k, v, beta, log_decay, state, scale, cu_seqlens, *vectors.values())


def _vectors(read: Tensor | None, erase: Tensor | None) -> dict[str, Tensor]:
    """The vectors that replace k, by name: two or none."""
    if read is None and erase is None:
        return {}
    if read is None or erase is None:
        missing = "read" if read is None else "erase"
        raise ValueError(f"delta_rule: {missing} is None, expected both read and erase, or neither")
    return {"read": read, "erase": erase}


def _wide_backend(requested: str) -> str:
    """The backend for calls with `read` and `erase`."""
    if requested in ("triton", "native"):
        raise ValueError(f"delta_rule: backend={requested} has no read and erase; use chunked or auto")
    return "chunked" if requested == "auto" else requested
