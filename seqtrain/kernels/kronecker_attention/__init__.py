"""Kronecker attention of any order: as many keys and values a token as a weight has tokens (arXiv 2310.04064)."""

import string
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
from seqtrain.kernels.tensor_attention.features import DEGREE, correction, feature_count, features

__all__ = ["kronecker_attention", "read_sums", "sums_of"]

# Tokens whose features are held at once: F of them stand for K numbers.
TOKENS = 4096


class KroneckerSegment(AffineSegment):
    """As of tensor attention: sums that do not decay, and outputs that wait for what came before."""

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        return None

    def transition(self) -> tuple[Tensor | None, Tensor]:
        _, keys, values = self.tensors
        return None, sums_of(keys, values, self.options.get("degree", DEGREE))

    def add_incoming(self, state: Tensor) -> Tensor:
        out, _ = self.operator(*self.tensors, initial_state=state, backend=self.backend, **self.options)
        return out


def sums_of(keys: Tensor, values: Tensor, degree: int) -> Tensor:
    """`sum_t phi(k_t)^T [v_t, 1]` of every key: `[B,T,H,R,K]`, `[B,T,H,R,V]` -> `[B,H,R,F,V+1]`."""
    dtype, total = state_dtype(keys.dtype, values.dtype), None
    with full_precision(keys.device):
        # One turn at least, so that gradients find their way on a rank without tokens, too.
        for start in range(0, max(keys.shape[1], 1), TOKENS):
            rows = slice(start, start + TOKENS)
            part = checkpoint(_sums, keys[:, rows], values[:, rows], degree, dtype, use_reentrant=False)
            total = part if total is None else total + part
    assert total is not None
    return total


def _sums(keys: Tensor, values: Tensor, degree: int, dtype: torch.dtype) -> Tensor:
    rows = F.pad(values.to(dtype), (0, 1), value=1.0)
    return torch.einsum("bthrf,bthrv->bhrfv", features(keys.to(dtype), degree), rows)


def read_sums(q: Tensor, sums: Tensor, degree: int, scale: float) -> Tensor:
    """What queries `[B,T,H,K]` read of `sums: [B,H,R,F,V+1]`, all of them of the same: `[B,T,H,V]`, as the sums."""
    with full_precision(q.device):
        product = sums.prod(2)
        read = [
            torch.einsum("bthf,bhfv->bthv", asked, product)
            for asked in (query_features(part, degree, scale, sums) for part in q.split(TOKENS, 1))
        ]
        out = torch.cat(read, 1) if read else q.new_empty(*q.shape[:3], sums.shape[4], dtype=sums.dtype)
    return out[..., :-1] / out[..., -1:]


def query_features(q: Tensor, degree: int, scale: float, sums: Tensor) -> Tensor:
    """`[B,T,H,K]` -> `[B,T,H,F]`, weighed so that their product with R keys' features is the polynomial."""
    return features(q.to(sums.dtype) * scale, degree) * correction(q.shape[-1], degree, 1 + sums.shape[2]).to(sums)


@operator(
    arguments={"q": "B T H K", "keys": "B T H R K", "values": "B T H R V"},
    out="B T H V",
    state=lambda *, H, R, K, V, degree=DEGREE, **_: (H, R, feature_count(K, degree), V + 1),
    state_from=("q", "keys", "values"),
    # R updates (2 each), the elementwise product of R states and its reading (2).
    flops=lambda *, B, T, H, R, K, V, degree=DEGREE, **_: (3 * R + 1) * B * T * H * feature_count(K, degree) * (V + 1),
    backends=("reference", "chunked"),
    time=AffineScan(KroneckerSegment),
)
def kronecker_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    degree: int | None = DEGREE,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`o_t = sum_{i_1,...,i_R} p_t(i_1,...,i_R) v1_{i_1} * ... * vR_{i_R}`: attention of order R + 1, i_r <= t.

    `p_t` is in proportion to `exp(scale * sum_c q_tc k1_{i_1 c} ... kR_{i_R c})`, exp replaced by its Taylor polynomial
    of even `degree`, as in `tensor_attention`, which is order 3. `degree=None` is exact, and of cost T^(R+1): for small
    T, without a state; with `causal=False` its tokens see all of their document.

    `q`: `[B,T,H,K]`, `keys`: `[B,T,H,R,K]`, `values`: `[B,T,H,R,V]`, floating; R is 1 at least. `scale` defaults to
    `K ** -0.5`. `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1). `initial_state`:
    `[B,H,R,F,V+1]` (zeros when None), `[N,...]` with documents: the sums of `phi(k)^T [v, 1]`.

    Returns `out`, `[B,T,H,V]` in the values' dtype, and the final state, float32 (float64 for float64 inputs); None for
    `degree=None`. Raises `ValueError` for a wrong shape, dtype, device, degree or backend.
    """
    tensors = (q, keys, values)
    if degree is None:
        return _exact(tensors, scale, causal, initial_state, cu_seqlens), None
    if degree < 0 or degree % 2:
        rule = "an even number (its polynomial is positive everywhere) or None"
        raise ValueError(f"kronecker_attention: degree={degree}, expected {rule}")
    if not causal:
        raise ValueError(
            "kronecker_attention: causal=False is there for degree=None; sums_of and read_sums do the rest"
        )
    call = kronecker_attention.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale, degree=degree)
    with full_precision(q.device):
        out, final = call.run(tensors, call.state, cu_seqlens, call.scale, degree)
    return out.to(values.dtype), final


def _exact(
    tensors: tuple[Tensor, ...],
    scale: float | None,
    causal: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Softmax attention of order R + 1 itself: the measure of the Taylor form's error."""
    if initial_state is not None:
        raise ValueError(
            "kronecker_attention: initial_state given with degree=None, which has no state of constant size; pass None"
        )
    sizes = kronecker_attention.check(tensors)
    states = check_documents("kronecker_attention", cu_seqlens, sizes["B"], sizes["T"])
    factor, order = sizes["K"] ** -0.5 if scale is None else scale, sizes["R"]
    # Of each of the R tokens of a weight.
    places = [letter for letter in string.ascii_lowercase if letter not in "bthcv"][:order]

    def one(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens, index = q.shape[1], "".join(places)
        each = ",".join(f"b{place}hc" for place in places)
        scores = torch.einsum(f"bthc,{each}->bht{index}", q, *keys.unbind(3)) * factor
        if causal:
            token = torch.arange(tokens, device=q.device)
            for dim in range(order):
                seen = token.view(-1, *[1] * dim) <= token.view(-1, *[1] * order)
                scores = scores.masked_fill(~seen, -torch.inf)
        weights = scores.flatten(3).softmax(-1).view(scores.shape)
        read = ",".join(f"b{place}hv" for place in places)
        return torch.einsum(f"bht{index},{read}->bthv", weights, *values.unbind(3)), state

    dtype = state_dtype(*(tensor.dtype for tensor in tensors))
    wide = tuple(tensor.to(dtype) for tensor in tensors)
    return by_document(one, wide, wide[0].new_zeros(states, 0), cu_seqlens)[0].to(tensors[2].dtype)


@kronecker_attention.backend(like=lambda inputs, state: inputs[2][:, :, :, 0].to(state.dtype))
def reference(
    inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float, degree: int
) -> tuple[Tensor, Tensor]:
    """The definition: R sums of outer products, one loop over tokens; `out` comes back in the state's dtype."""
    q, keys, values = inputs
    asked = query_features(q, degree, scale, state)
    written, columns = features(keys.to(state.dtype), degree), F.pad(values.to(state.dtype), (0, 1), value=1.0)

    def step(q: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state + keys[..., :, None] * values[..., None, :]  # B H R F V+1
        sums = torch.einsum("bhf,bhfv->bhv", q, state.prod(2))
        return sums[..., :-1] / sums[..., -1:], state

    return by_token(step, (asked, written, columns), state, cu_seqlens, like=values[:, :, :, 0])
