"""Diagonal linear recurrence, real or complex: what gated RNNs and diagonal state-space models are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, AffineSegment, Options


class DiagonalScanSegment(AffineSegment):
    """The scan from zero gives the update; how far the incoming state decays is found while it is on its way."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        x = tensors[0]
        return x.shape[0], x.shape[2]

    def transition(self) -> tuple[Tensor | None, Tensor]:
        x, log_a = self.tensors
        self.out, update = self.operator(x, log_a, backend=self.backend, **self.options)
        log_a = log_a.to(update.dtype)
        # Contiguous, since the order of a sum depends on strides, and bits are to depend on numbers alone.
        total = log_a.contiguous().sum(1) if log_a.dim() == 3 else (log_a * x.shape[1]).expand(x.shape[0], -1)
        return total.exp(), update

    def local_output(self) -> None:
        x, log_a = self.tensors
        log_a = log_a.to(self.state_dtype)
        if log_a.dim() == 3:
            self.factor = log_a.cumsum(1).exp()  # B T D
        else:
            tokens = torch.arange(1, x.shape[1] + 1, dtype=log_a.real.dtype, device=x.device)
            self.factor = (tokens[:, None] * log_a).exp()  # T D

    def add_incoming(self, state: Tensor) -> Tensor:
        return self.out + (self.factor * state[:, None]).to(self.out.dtype)


@operator(
    arguments={"x": "B T D", "log_a": ("D", "B T D")},
    kinds=dict.fromkeys(("x", "log_a"), "a floating or complex dtype"),
    out="B T D",
    state=lambda *, D, **_: (D,),
    state_from=("x", "log_a", "initial_state"),
    # A complex product is six operations, a complex sum two.
    flops=lambda *, B, T, D, complex, **_: (8 if complex else 2) * B * T * D,
    backends=("reference", "chunked", "native", "triton"),
    time=AffineScan(DiagonalScanSegment),
)
def diagonal_scan(
    x: Tensor,
    log_a: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_a_t) * h_{t-1} + x_t`, elementwise (docs/math.md, section 1.3).

    `x`: `[B,T,D]`, floating or complex. `log_a`: `[B,T,D]`, or `[D]` where it is the same for all tokens (S4D, S5)
    and its exponential is taken once; floating or complex, its real part <= 0.
    `initial_state`: `[B,D]`, h before the first token (zeros when None); `[N,D]` with documents.
    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1).

    Returns `h`, `[B,T,D]` in x's dtype (complex where log_a is), and the last h of each row or document, float32,
    float64 for float64 inputs, complex where an input is. Raises `ValueError` for a wrong shape, dtype, device or
    backend.
    """
    call = diagonal_scan.prepare((x, log_a), backend, initial_state, cu_seqlens)
    out, final = call.run((x, log_a), call.state, cu_seqlens)
    return out.to(call.state.dtype if call.state.is_complex() else x.dtype), final


@diagonal_scan.backend(like=lambda inputs, state: inputs[0].to(state.dtype))
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition: one loop over tokens; `h` comes back in the state's dtype."""

    def step(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = log_a.exp() * state + x
        return state, state

    x, log_a = inputs
    log_a = log_a.to(torch.promote_types(log_a.dtype, torch.float32)).expand(x.shape)
    return by_token(step, (x, log_a), state, cu_seqlens, like=x)
