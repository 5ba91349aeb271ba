"""TTT-Linear: a memory that is a linear model with a LayerNorm, trained on each token while the sequence is read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import by_document
from seqtrain.kernels.operator import Inputs, operator

EPS = 1e-6


@dataclass(frozen=True)
class InnerModel:
    """What is learned of it once for all tokens; in the state's dtype."""

    start: Tensor  # [H,K+1,K]
    weight: Tensor  # [H,1,K]
    bias: Tensor  # [H,1,K]
    shares: Tensor  # [C]

    def norm(self, z: Tensor) -> Tensor:
        """`z: [B,H,T,K]` normalised to mean 0 and variance 1, times `weight`, plus `bias`."""
        return _standardised(z)[0] * self.weight + self.bias

    def error_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """The gradient in z of `|norm(z) - target|^2 / 2`, all `[B,H,T,K]`."""
        unit, inverse = _standardised(z)
        gradient = (unit * self.weight + self.bias - target) * self.weight
        # What changes the mean or the variance of z is taken out again by the norm.
        along = (gradient * unit).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True) - unit * along) * inverse


def _standardised(z: Tensor) -> tuple[Tensor, Tensor]:
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * inverse, inverse


def with_one(x: Tensor) -> Tensor:
    """`[...,K]` -> `[...,K+1]`: the input that meets the bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def unpack(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B,H,2K+3,K]` -> the change of W and the sum of gradients, `[B,H,K+1,K]` each, and the count, int64 `[B]`."""
    rows = state.shape[3] + 1
    change, total, count = state.split([rows, rows, 1], 2)
    return change, total, count[:, 0, 0, 0].round().to(torch.int64)


def pack(change: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """The reverse of `unpack`."""
    row = count.to(change.dtype).view(-1, 1, 1, 1).expand(-1, change.shape[1], 1, change.shape[3])
    return torch.cat([change, total, row], 2)


@operator(
    arguments={
        **dict.fromkeys(("q", "k", "v"), "B T H K"),
        "rate": "B T H",
        "start": "H K+1 K",
        "norm_weight": "H K",
        "norm_bias": "H K",
        "shares": "C",
    },
    out="B T H K",
    state=lambda *, H, K, **_: (H, 2 * K + 3, K),
    # The inner model's answers to k and to q, and the gradient's outer product.
    flops=lambda *, B, T, H, K, **_: 6 * B * T * H * (K + 1) * K,
    backends=("reference", "chunked"),
)
def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    start: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    shares: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`out_t = f(q_t; W_t)`, where `f(x; W) = x + LN([x, 1] W)` learns `f(k_s) = v_s` from the tokens s <= t.

    Tokens come in mini-batches of C, C the number of `shares`. Gradients `g_s` of `|f(k_s; W) - v_s|^2 / 2` in W are
    all taken at W as it was before s's mini-batch; `W_t = W - shares[c] * sum_s rate_s g_s` over the mini-batch's
    tokens up to t, its c-th from 0. After its last token W_t is the next one's W.

    q, k, v: `[B,T,H,K]`, floating. rate: `[B,T,H]`, at least 0. start: `[H,K+1,K]`, each head's first W, its last row
    the bias. norm_weight, norm_bias: `[H,K]`, of the LayerNorm. shares: `[C]`, at least 0. The last four are
    learned: one for all tokens.
    initial_state: `[B,H,2K+3,K]`, or `[N,...]` under `cu_seqlens`; zeros where None. W less `start` (K+1 rows), the sum
        of the unfinished mini-batch's `rate_s g_s` (K+1 rows), and how many tokens it has (1 row).
    cu_seqlens: int32 or int64 `[N+1]`, boundaries of N documents packed into one row (B == 1); documents may be empty.
    backend: "auto", "chunked" or "reference".

    Returns `(out, final_state)`: out `[B,T,H,K]` in v's dtype; the state float32 (float64 for float64 inputs).
    Differentiable in every tensor. The state is no affine function of the state before: sequence-parallel ranks
    take turns. Raises `ValueError` for wrong shapes, dtypes, devices or backends.
    Source: Sun et al. 2024 (arXiv 2407.04620), sections 2.4 to 2.7.
    """
    tensors = (q, k, v, rate, start, norm_weight, norm_bias, shares)
    call = ttt_linear.prepare(tensors, backend, initial_state, cu_seqlens)
    start, norm_weight, norm_bias, shares = (x.to(call.state.dtype) for x in tensors[4:])
    learned = (start, norm_weight[:, None], norm_bias[:, None], shares)
    with full_precision(q.device):
        return call.run((q, k, v, rate, *learned), call.state, cu_seqlens)


@ttt_linear.backend(like=lambda inputs, state: inputs[2])
def reference(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition: one loop over tokens, gradients by autograd; `inputs` as in the chunked form."""
    *tokens, start, weight, bias, shares = inputs
    model = InnerModel(start, weight, bias, shares)

    def loop(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        change, total, count = unpack(state)
        out = []
        for t in range(q.shape[1]):
            query, key, value = (x[:, t, :, None].to(state.dtype) for x in (q, k, v))  # B H 1 K
            gradient = model.error_gradient(with_one(key) @ (start + change), value - key)
            total = total + rate[:, t, :, None, None].to(state.dtype) * (with_one(key).mT @ gradient)
            now = change - shares[count][:, None, None, None] * total
            out.append((query + model.norm(with_one(query) @ (start + now)))[:, :, 0])
            last = (count == len(shares) - 1)[:, None, None, None]
            change, total = torch.where(last, now, change), total.masked_fill(last, 0)
            count = (count + 1) % len(shares)
        return (torch.stack(out, 1) if out else v.to(state.dtype)), pack(change, total, count)

    out, state = by_document(loop, tuple(tokens), state, cu_seqlens)
    return out.to(inputs[2].dtype), state
