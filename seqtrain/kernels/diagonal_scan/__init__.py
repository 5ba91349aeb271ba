"""Diagonal linear recurrence, real or complex: what gated RNNs and diagonal state-space models are made of."""

from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose
from seqtrain.kernels.documents import state_dtype


def diagonal_scan(
    x: Tensor,
    log_a: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_a_t) * h_{t-1} + x_t`, elementwise (MATH.md 1.3).

    `x`: `[B,T,D]`, floating or complex. `log_a`: `[B,T,D]`, or `[D]` where it is the same for all tokens (S4D, S5)
    and its exponential is taken once; floating or complex, its real part <= 0.
    `initial_state`: `[B,D]`, h before the first token (zeros when None); `[N,D]` with documents.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1).

    Returns `h`, `[B,T,D]` in x's dtype (complex where log_a is), and the last h of each row or document, float32,
    float64 for float64 inputs, complex where an input is. Raises `ValueError` for a wrong shape, dtype, device or
    backend.
    """
    name = "diagonal_scan"
    sizes = check_shapes(name, {"x": (x, "B T D"), "log_a": (log_a, "D" if log_a.dim() == 1 else "B T D")})
    check_floating(name, {"x": x, "log_a": log_a}, allow_complex=True)
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    check_state(name, initial_state, (states, sizes["D"]), x.device)
    dtype = state_dtype(x.dtype, log_a.dtype, *(() if initial_state is None else (initial_state.dtype,)))
    state = x.new_zeros(states, sizes["D"], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    run = choose(name, backend, x.device, single_token=sizes["T"] == 1 and cu_seqlens is None)
    out, final = run(x, log_a, state, cu_seqlens)
    return out.to(dtype if dtype.is_complex else x.dtype), final
