"""Diagonal state-space systems, one a channel: `diagonal_scan` with constant decays between a writing and a reading."""

from typing import Literal

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_floating, check_shapes, check_state
from seqtrain.kernels.dispatch import choose
from seqtrain.kernels.documents import state_dtype


def diagonal_system(
    u: Tensor,
    log_a: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    form: Literal["scan", "fft"] = "scan",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_a) h_{t-1} + write u_t`, `y_t = Re(sum_n read_n h_tn)`: N states for each of G channels (S4D).

    `u`: `[B,T,G]`, floating. `log_a`, `write`, `read`: complex `[G,N]`, the real part of `log_a` <= 0. A real system of
    2N states in conjugate pairs has one of each pair here and twice its C in `read`.
    `form`: how outputs are found: "scan", a chunk at a time from the state before it; "fft", all at once as one long
    convolution, which is what S4 does; documents are always scanned. Both are equal to rounding.
    `initial_state`: complex `[B,G*N]`, h before the first token (zeros when None); one row a document with documents.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1).

    Returns `y`, `[B,T,G]` in u's dtype, and the last h of each row or document, complex64 (complex128 for float64
    inputs). Raises `ValueError` for a wrong shape, dtype, device, form or backend. Source: arXiv 2206.11893.
    """
    name = "diagonal_system"
    matrices = {"log_a": (log_a, "G N"), "write": (write, "G N"), "read": (read, "G N")}
    sizes = check_shapes(name, {"u": (u, "B T G"), **matrices})
    check_floating(name, {"u": u})
    for key, (tensor, _) in matrices.items():
        if not tensor.is_complex():
            raise ValueError(f"{name}: {key} has dtype {tensor.dtype}, expected a complex dtype")
    if form not in ("scan", "fft"):
        raise ValueError(f"{name}: form={form!r}, expected 'scan' or 'fft'")
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    expected = (states, sizes["G"] * sizes["N"])
    check_state(name, initial_state, expected, u.device)
    dtype = torch.promote_types(state_dtype(u.dtype), log_a.dtype)
    state = torch.zeros(expected, dtype=dtype, device=u.device) if initial_state is None else initial_state.to(dtype)
    run = choose(name, backend, u.device, single_token=sizes["T"] == 1 and cu_seqlens is None)
    return run(u, log_a.to(dtype), write.to(dtype), read.to(dtype), form, state, cu_seqlens)
