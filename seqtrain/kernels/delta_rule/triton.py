"""The delta rule by Triton kernels; wider heads than theirs, and float64 on a GPU, take the chunked form."""

from typing import Any

from torch import Tensor

from seqtrain.kernels.delta_rule import chunked, delta_rule
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples

__all__ = ["EXAMPLES", "run", "step", "unavailable"]

EXAMPLES = recurrence_examples(delta_rule, beta=True)


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Triton's `delta_rule`, without `read` and `erase`; arguments as those of the chunked form."""
    from seqtrain.kernels.triton import recurrence

    return (recurrence if recurrence.serves(arguments[0]) else chunked).run(*arguments)


# With one token per row, the forward pass is a single launch.
step = run
