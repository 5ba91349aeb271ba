"""What projections pass through: step sizes, decay rates and forget gates, and feature maps of linear attention."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.layers.norms import upcast


def reset_step_bias(bias: Tensor, generator: torch.Generator | None, low: float = 1e-3, high: float = 1e-1) -> None:
    """Fills `bias` so that `softplus(bias)`, the step size of a zero input, is log-uniform in `[low, high]` (Mamba)."""
    with torch.no_grad():
        nn.init.uniform_(bias, math.log(low), math.log(high), generator=generator)
        # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
        step = bias.exp()
        bias.copy_(step + (-torch.expm1(-step)).log())


def reset_decay_rate(rate_log: Tensor, generator: torch.Generator | None, low: float = 1.0, high: float = 16.0) -> None:
    """Fills `rate_log` with the logarithm of numbers uniform in `[low, high]`: the `A_log` of Mamba-2."""
    with torch.no_grad():
        nn.init.uniform_(rate_log, low, high, generator=generator)
        rate_log.log_()


def step_sizes(raw: Tensor, bias: Tensor) -> Tensor:
    """`softplus(raw + bias)`, in float32 at least."""
    return F.softplus(upcast(raw) + bias)


def log_forget(raw: Tensor, temperature: float = 1.0) -> Tensor:
    """`log(sigmoid(raw) ** (1 / temperature))`, in float32 at least: what a forget gate keeps, more if it is larger."""
    return F.logsigmoid(upcast(raw)) / temperature


def taylor2(x: Tensor) -> Tensor:
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = q . k / sqrt(K)` (Based, arXiv 2402.18668, section 3.1).

    `[..., K]` -> `[..., 1 + K + K(K+1)/2]`: the square's symmetric products are merged, with weight sqrt(2).
    """
    width = x.shape[-1]
    x = x * width**-0.25
    row, column = torch.triu_indices(width, width, device=x.device)
    weight = torch.where(row == column, x.new_tensor(math.sqrt(0.5)), x.new_ones(()))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], -1)


def elu(x: Tensor) -> Tensor:
    """`elu(x) + 1`: positive, and `x + 1` for x > 0."""
    return F.elu(x) + 1


# Name -> (map of linear attention, whether phi(q) . phi(k) >= 0, which a sum as normalizer needs): `phi(q) . phi(k)`
# stands where softmax attention has `exp(q . k)`.
FEATURE_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "identity": (torch.positive, False),
    "elu": (elu, True),
    "relu": (F.relu, True),
    "taylor2": (taylor2, True),
}
