"""The delta rule with decay: the recurrence of DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_token
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.segments import AffineScan, AffineSegment, Options

# Whether the norms of keys were looked at.
_looked = False


class DeltaRuleSegment(AffineSegment):
    """Over a sharded sequence: one pass gives outputs, the map, and how both depend on the past.

    The rule is linear in values and state together. So values that are zero, from a state that is the identity, give as
    final state the transition M and as outputs the matrix R that reads an incoming state: `out = out_0 + R S`. These
    K columns go next to the V columns of the values through the same pass.
    """

    @staticmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        batch, _, heads, key = tensors[0].shape
        return batch, heads, key, key

    def transition(self) -> tuple[Tensor | None, Tensor]:
        q, k, v, *rest = self.tensors
        batch, _, heads, key = q.shape
        width, dtype = v.shape[3], self.state_dtype
        # Not in v's dtype: M and R are read with a state of the state's dtype.
        columns = torch.cat([v.to(dtype), v.new_zeros(*v.shape[:3], key, dtype=dtype)], 3)
        state = torch.eye(key, key + width, dtype=dtype, device=v.device).roll(width, 1)
        out, final = self.operator(
            q, k, columns, *rest, initial_state=state.expand(batch, heads, -1, -1), backend=self.backend, **self.options
        )
        self.out, self.read = out.split([width, key], 3)
        update, transition = final.split([width, key], 3)
        return transition, update

    def add_incoming(self, state: Tensor) -> Tensor:
        with full_precision(state.device):
            return (self.out + torch.einsum("bthk,bhkv->bthv", self.read, state)).to(self.tensors[2].dtype)


@operator(
    arguments={
        "q": "B T H K",
        "k": "B T H K",
        "v": "B T H V",
        "beta": "B T H",
        "log_decay": ("B T H", "B T H K"),
        "read": "B T H K",
        "erase": "B T H K",
    },
    out="B T H V",
    state=lambda *, H, K, V, **_: (H, K, V),
    # What the state holds for k (`k S`), the correction of it, and the reading `q S`.
    flops=lambda *, B, T, H, K, V, **_: 6 * B * T * H * K * V,
    backends=("reference", "chunked", "native", "triton", "flash_qla", "attn_gym", "fla"),
    time=AffineScan(DeltaRuleSegment),
)
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
    read, erase: `[B,T,H,K]`, floating, both or neither; k where None. The diagonal plus low-rank (DPLR) form of RWKV-7:
        `S_t = (I - beta_t erase_t^T read_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t`. `read` queries the decayed state,
        along `erase` its answer is removed. Stable where `|1 - beta_t read_t . erase_t| <= 1`
        and both are parallel, or nearly.
    scale: factor of the output; `K ** -0.5` where None.
    initial_state: `[B,H,K,V]`, or `[N,H,K,V]` under `cu_seqlens`; zeros where None.
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked", "reference", "triton" or "native"; with `read` and `erase` one of the first three.

    Returns `(out, final_state)`: out `[B,T,H,V]` in v's dtype; final_state `[B or N,H,K,V]`, float32 (float64 for
    float64 inputs). Differentiable in every tensor. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: docs/math.md, section 1.2; the chunk form is that of Yang et al. 2024 (arXiv 2406.06484, 2412.06464).
    """
    if (read is None) != (erase is None):
        missing = "read" if read is None else "erase"
        raise ValueError(f"delta_rule: {missing} is None, expected both read and erase, or neither")
    if read is not None and backend in ("triton", "native"):
        raise ValueError(f"delta_rule: backend={backend} has no read and erase; use chunked or auto")
    if read is not None and backend == "auto":
        backend = "chunked"
    if read is None and not torch.compiler.is_compiling():
        _warn_of_long_keys(k)
    tensors = (q, k, v, beta, log_decay, read, erase)
    call = delta_rule.prepare(tensors, backend, initial_state, cu_seqlens, scale=scale)
    with full_precision(q.device):
        return call.run(tensors, call.state, cu_seqlens, call.scale)


def _warn_of_long_keys(k: Tensor) -> None:
    """Says once, of the first call in a process, that its keys make the state grow; looking costs a pass over them."""
    global _looked
    if _looked or k.is_meta:
        return
    _looked = True
    longest = float(k.detach().float().norm(dim=-1).max()) if k.numel() else 0.0
    # Keys that were normalised in bfloat16 have a norm of 1 up to its rounding.
    if longest > 1.05:
        warnings.warn(
            f"delta_rule: keys have a norm of up to {longest:.3g}; above 1 the state can grow without bound. Normalise "
            "them, as in torch.nn.functional.normalize(k, dim=-1)",
            stacklevel=3,
        )


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition (docs/math.md, 1.2): one loop over tokens, gradients by autograd."""
    q, k, v, beta, log_decay, read, erase = inputs
    read, erase = k if read is None else read, k if erase is None else erase

    def step(*tensors: Any) -> tuple[Tensor, Tensor]:
        *vectors, beta, log_decay, state = tensors
        if log_decay is not None:
            a = log_decay.to(state.dtype).exp()
            state = state * (a[..., None, None] if a.dim() == 2 else a[..., None])  # B H K V
        query, key, value, asked, taken = (x[:, :, None, :].to(state.dtype) for x in vectors)
        held = asked @ state  # B H 1 V
        strength = beta[:, :, None, None].to(state.dtype)
        state = state + key.mT * (strength * value) - taken.mT * (strength * held)
        return scale * (query @ state)[:, :, 0], state

    out, state = by_token(step, (q, k, v, read, erase, beta, log_decay), state, cu_seqlens, like=v)
    return out.to(v.dtype), state
