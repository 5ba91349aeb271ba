"""Diagonal state-space systems, one per channel: `diagonal_scan` with constant decays, written to and read from."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from seqtrain.kernels.diagonal_scan import reference as scan_reference
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, AffineSegment, Options


class DiagonalSystemSegment(AffineSegment):
    """The outputs from a zero state come with the update; the incoming state, decayed, is read out and added."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return tensors[0].shape[0], tensors[1].numel()

    def transition(self) -> tuple[Tensor | None, Tensor]:
        u, log_a = self.tensors[:2]
        self.out, update = self.operator(*self.tensors, backend=self.backend, **self.options)
        total = (log_a.to(torch.complex128).flatten() * u.shape[1]).exp().to(update.dtype)
        return total.expand(u.shape[0], -1), update

    def add_incoming(self, state: Tensor) -> Tensor:
        # It has the operator, which has this.
        from seqtrain.kernels.diagonal_system.chunked import decayed_reading

        u, log_a, _, read = self.tensors
        if u.shape[1] == 0:
            return self.out
        return self.out + decayed_reading(log_a, read.to(state.dtype), state, u.shape[1]).to(self.out.dtype)


@operator(
    arguments={"u": "B T G", "log_a": "G N", "write": "G N", "read": "G N"},
    kinds=dict.fromkeys(("log_a", "write", "read"), "a complex dtype"),
    out="B T G",
    state=lambda *, G, N, **_: (G * N,),
    state_from=("u", "log_a"),
    # The scan of N complex states per channel (8), and `Re(read h)`, two products and two sums per state.
    flops=lambda *, B, T, G, N, **_: 12 * B * T * G * N,
    backends=("reference", "chunked"),
    time=AffineScan(DiagonalSystemSegment),
)
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
    `initial_state`: complex `[B,G*N]`, h before the first token (zeros when None); one row per document with documents.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1).

    Returns `y`, `[B,T,G]` in u's dtype, and the last h of each row or document, complex64 (complex128 for float64
    inputs). Raises `ValueError` for a wrong shape, dtype, device, form or backend. Source: arXiv 2206.11893.
    """
    if form not in ("scan", "fft"):
        raise ValueError(f"diagonal_system: form={form!r}, expected 'scan' or 'fft'")
    call = diagonal_system.prepare((u, log_a, write, read), backend, initial_state, cu_seqlens)
    matrices = (matrix.to(call.state.dtype) for matrix in (log_a, write, read))
    return call.run((u, *matrices), call.state, cu_seqlens, form)


@diagonal_system.backend(like=lambda inputs, state: inputs[0])
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """The definition: every state of every token, by the definition of the scan; `form` makes no difference here."""
    u, log_a, write, read = inputs
    written = (u[..., None].to(state.dtype) * write).flatten(2)  # B T G*N
    hidden, final = scan_reference((written, log_a.flatten()), state, cu_seqlens)
    out = (hidden.unflatten(2, read.shape) * read).real.sum(3)
    return out.to(u.dtype), final
