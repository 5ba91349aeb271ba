"""The PyTorch form; nothing is cut into chunks."""

import torch.nn.functional as F
from torch import Tensor


def run(up: Tensor) -> Tensor:
    """See `swiglu`."""
    gate, value = up.unbind(-2)
    return F.silu(gate) * value
