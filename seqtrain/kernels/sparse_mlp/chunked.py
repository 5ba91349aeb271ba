"""The PyTorch form: two matrix products with all channels."""

import torch.nn.functional as F
from torch import Tensor


def run(gate: Tensor, x: Tensor, value: Tensor, down: Tensor) -> Tensor:
    """See `sparse_mlp`."""
    hidden = F.linear(x, value.to(x.dtype)) * gate.to(x.dtype)
    return F.linear(hidden, down.T.to(x.dtype))
