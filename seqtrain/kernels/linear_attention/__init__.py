"""Linear attention with decay: the additive recurrence that carries RetNet, GLA, HGRN2, Mamba-2 and their kin."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, AffineSegment, Options


class LinearAttentionSegment(AffineSegment):
    """Outputs from a zero state are computed while the scan runs; the incoming state's part is added to them.

    With `b` the running sum of log decays over the segment's T tokens, the transition is `e^{b_T}`, the update
    `sum_j (k_j e^{b_T - b_j})^T v_j`, and the incoming state adds `scale (q_i e^{b_i}) S` to the outputs (docs/math.md,
    sections 1.1 and 2).
    """

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        q, log_decay = tensors[0], _decay(tensors)
        if log_decay is None:
            return None
        return (q.shape[0], q.shape[2], q.shape[3])[: 3 if log_decay.dim() == 4 else 2]

    def transition(self) -> tuple[Tensor | None, Tensor]:
        _, k, v = self.tensors[:3]
        find_map = self.operator.choose(self.backend, k.device, function="find_map")
        with full_precision(k.device):
            return find_map((None, k, v, self._log_decay()), None)

    def local_output(self) -> None:
        self.out, _ = self.operator(*self.tensors, backend=self.backend, **self.options)

    def add_incoming(self, state: Tensor) -> Tensor:
        q, scale = self.tensors[0], self.options.get("scale")
        read = self.operator.choose(self.backend, q.device, function="read")
        with full_precision(q.device):
            inputs = (q, None, self.out, self._log_decay())
            return read(inputs, state, q.shape[3] ** -0.5 if scale is None else scale)

    def _log_decay(self) -> Tensor | None:
        """`[B,T,H]` or `[B,T,H,K]`, or None."""
        log_decay = _decay(self.tensors)
        return log_decay if log_decay is None or log_decay.dim() > 1 else log_decay.expand(self.tensors[0].shape[:3])


def _decay(tensors: Sequence[Any]) -> Tensor | None:
    return tensors[3] if len(tensors) > 3 else None


@operator(
    arguments={"q": "B T H K", "k": "B T H K", "v": "B T H V", "log_decay": ("H", "B T H", "B T H K")},
    out="B T H V",
    state=lambda *, H, K, V, **_: (H, K, V),
    # The update `k^T v` and the reading `q S`.
    flops=lambda *, B, T, H, K, V, **_: 4 * B * T * H * K * V,
    backends=("reference", "chunked", "native", "triton"),
    time=AffineScan(LinearAttentionSegment),
)
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
    Source: docs/math.md, section 1.1; the chunk form is that of GLA (Yang et al. 2023, arXiv 2312.06635, section 4).
    """
    tensors = (q, k, v, log_decay)
    call = linear_attention.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.to(call.state.dtype).expand(q.shape[:3])
    with full_precision(q.device):
        return call.run((q, k, v, log_decay), call.state, cu_seqlens, call.scale)


@linear_attention.backend(like=lambda inputs, state: inputs[2])
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition (docs/math.md, 1.1): one loop over tokens, gradients by autograd."""

    def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(state.dtype) for x in (q, k, v))
        if log_decay is not None:
            a = log_decay.to(state.dtype).exp()
            state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
        state = state + k[..., None] * v[:, :, None, :]
        return scale * (q[:, :, None, :] @ state)[:, :, 0], state

    out, state = by_token(step, inputs, state, cu_seqlens, like=inputs[2])
    return out.to(inputs[2].dtype), state
