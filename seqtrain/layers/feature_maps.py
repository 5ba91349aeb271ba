"""Feature maps of linear attention: `phi(q) . phi(k)` stands where softmax attention has `exp(q . k)`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def taylor2(x: Tensor) -> Tensor:
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = q . k / sqrt(K)` (Based, arXiv 2402.18668, section 3.1).

    `[..., K]` -> `[..., 1 + K + K(K+1)/2]`: the square's symmetric products are merged, with weight sqrt(2).
    """
    width = x.shape[-1]
    x = x * width**-0.25
    row, column = torch.triu_indices(width, width, device=x.device)
    weight = torch.where(row == column, x.new_tensor(math.sqrt(0.5)), x.new_ones(()))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], -1)


def _identity(x: Tensor) -> Tensor:
    return x


def elu(x: Tensor) -> Tensor:
    """`elu(x) + 1`: positive, and `x + 1` for x > 0."""
    return F.elu(x) + 1


# Name -> (map, whether phi(q) . phi(k) >= 0, which a sum as normalizer needs).
FEATURE_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "identity": (_identity, False),
    "elu": (elu, True),
    "relu": (F.relu, True),
    "taylor2": (taylor2, True),
}
