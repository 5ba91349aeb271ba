"""The PyTorch form: a product, then SwiGLU; nothing is cut into chunks."""

from torch import Tensor

from seqtrain.kernels.products import linear
from seqtrain.kernels.swiglu import swiglu


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See `linear_swiglu`."""
    return swiglu(linear(x, weight.flatten(0, 1), None).unflatten(-1, (2, -1)))
