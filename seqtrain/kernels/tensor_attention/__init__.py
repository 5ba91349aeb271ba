"""Tensor (Kronecker) attention: third-order attention as two linear recurrences."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqtrain.kernels.checks import check_documents
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_document, by_token, state_dtype
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, AffineSegment, Options
from seqtrain.kernels.tensor_attention.features import DEGREE, feature_count, features

__all__ = ["DEGREE", "feature_count", "tensor_attention"]


# Tokens whose features are held at once: F of them stand for K numbers.
TOKENS = 4096


class TensorAttentionSegment(AffineSegment):
    """The sums are found first, from features that are not kept. They do not decay: a segment's map only adds.

    Outputs are products of both sums, not linear in the state: they wait for it.
    """

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return None

    def transition(self) -> tuple[Tensor | None, Tensor]:
        _, k1, k2, v1, v2 = self.tensors
        shape, dtype = self.operator.state_shape(self.tensors, self.options, self.tensors[0].shape[0])
        degree = self.options.get("degree", DEGREE)
        sums = []
        with full_precision(k1.device):
            for k, v in ((k1, v1), (k2, v2)):
                total = torch.zeros(shape[:2] + shape[3:], dtype=dtype, device=k.device)
                # One turn at least, so that gradients find their way on a rank without tokens, too.
                for start in range(0, max(k.shape[1], 1), TOKENS):
                    rows = slice(start, start + TOKENS)
                    part = checkpoint(_sums, k[:, rows], v[:, rows], degree, dtype, use_reentrant=False)
                    total = total + part
                sums.append(total)
        return None, torch.stack(sums, 2)

    def add_incoming(self, state: Tensor) -> Tensor:
        out, _ = self.operator(*self.tensors, initial_state=state, backend=self.backend, **self.options)
        return out


def _sums(k: Tensor, v: Tensor, degree: int, dtype: torch.dtype) -> Tensor:
    """`sum_t phi(k_t)^T [v_t, 1]`: `[B,T,H,K]`, `[B,T,H,V]` -> `[B,H,F,V+1]`."""
    rows = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], 3)
    return torch.einsum("bthf,bthv->bhfv", features(k.to(dtype), degree), rows)


@operator(
    arguments={"q": "B T H K", "k1": "B T H K", "k2": "B T H K", "v1": "B T H V", "v2": "B T H V"},
    out="B T H V",
    state=lambda *, H, K, V, degree=DEGREE, **_: (H, 2, feature_count(K, degree), V + 1),
    state_from=("q", "k1", "k2", "v1", "v2"),
    # Two updates (4), the elementwise product of two states (1) and its reading (2).
    flops=lambda *, B, T, H, K, V, degree=DEGREE, **_: 7 * B * T * H * feature_count(K, degree) * (V + 1),
    backends=("reference", "chunked", "native", "triton"),
    time=AffineScan(TensorAttentionSegment),
)
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
    even `degree`, which makes the cost linear in T (docs/math.md, section 1.4); the weights are within
    `1 +- e^R R^(degree+1) / (degree+1)!` of the exact ones while the exponent stays within
    [-R, R]. `degree=None` is exact and cubic in T: for small T, without a state.

    `q, k1, k2`: `[B,T,H,K]`, `v1, v2`: `[B,T,H,V]`, floating; keep K small, for there are `F = feature_count(K,
    degree)` features. `scale` defaults to `K ** -0.5`. `cu_seqlens`: int `[N+1]`, document boundaries of a packed row
    (then B == 1).
    `initial_state`: `[B,H,2,F,V+1]` (zeros when None), `[N,...]` with documents: the two sums of `phi(k)^T [v, 1]`.

    Returns `out`, `[B,T,H,V]` in v1's dtype, and the final state, float32 (float64 for float64 inputs); None for
    `degree=None`. Raises `ValueError` for a wrong shape, dtype, device, degree or backend.
    """
    tensors = (q, k1, k2, v1, v2)
    if degree is None:
        return _exact(tensors, scale, initial_state, cu_seqlens), None
    if degree < 0 or degree % 2:
        rule = "an even number (its polynomial is positive everywhere) or None"
        raise ValueError(f"tensor_attention: degree={degree}, expected {rule}")
    call = tensor_attention.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale, degree=degree)
    with full_precision(q.device):
        out, final = call.run(tensors, call.state, cu_seqlens, call.scale, degree)
    return out.to(v1.dtype), final


def _exact(
    tensors: tuple[Tensor, ...], scale: float | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Third-order softmax attention itself, cubic in T: the measure of the Taylor form's error."""
    if initial_state is not None:
        raise ValueError(
            "tensor_attention: initial_state given with degree=None, which has no state of constant size; pass None"
        )
    sizes = tensor_attention.check(tensors)
    states = check_documents("tensor_attention", cu_seqlens, sizes["B"], sizes["T"])
    factor = sizes["K"] ** -0.5 if scale is None else scale

    def one(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = q.shape[1]
        scores = torch.einsum("bthr,bihr,bjhr->bhtij", q, k1, k2) * factor
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~(seen[:, :, None] & seen[:, None, :]), -torch.inf)
        weights = scores.flatten(3).softmax(-1).view(scores.shape)
        return torch.einsum("bhtij,bihv,bjhv->bthv", weights, v1, v2), state

    dtype = state_dtype(*(tensor.dtype for tensor in tensors))
    wide = tuple(tensor.to(dtype) for tensor in tensors)
    return by_document(one, wide, wide[0].new_zeros(states, 0), cu_seqlens)[0].to(tensors[3].dtype)


@tensor_attention.backend(like=lambda inputs, state: inputs[3].to(state.dtype))
def reference(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int
) -> tuple[Tensor, Tensor]:
    """The definition: two sums of outer products, one loop over tokens; `out` comes back in the state's dtype."""
    (q, k1, k2, v1, v2), dtype = inputs, state.dtype
    q, k1, k2 = (features(x.to(dtype) * factor, degree) for x, factor in ((q, scale), (k1, 1.0), (k2, 1.0)))
    keys = torch.stack([k1, k2], 3)  # B T H 2 F
    values = torch.stack([F.pad(v.to(dtype), (0, 1), value=1.0) for v in (v1, v2)], 3)  # B T H 2 V+1

    def step(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state + keys[..., :, None] * values[..., None, :]  # B H 2 F V+1
        sums = torch.einsum("bhf,bhfv->bhv", q, state[:, :, 0] * state[:, :, 1])
        return sums[..., :-1] / sums[..., -1:], state

    return by_token(step, (q, keys, values), state, cu_seqlens, like=v1)
