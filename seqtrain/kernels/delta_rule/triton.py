"""The delta rule by Triton kernels; wider heads than theirs, and float64 on a GPU, take the chunked form."""

from typing import Any

from torch import Tensor

from seqtrain.kernels.delta_rule import chunked, delta_rule
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples
from seqtrain.kernels.operator import Inputs

__all__ = ["EXAMPLES", "run", "step", "unavailable"]

EXAMPLES = recurrence_examples(delta_rule, beta=True)


def run(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
    """Triton's `delta_rule`, without `read` and `erase`."""
    from seqtrain.kernels.triton import recurrence

    return recurrence.run(inputs[:5], *others) if recurrence.serves(inputs[0]) else chunked.run(inputs, *others)


# With one token per row, the forward pass is a single launch.
step = run
