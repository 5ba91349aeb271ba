"""The delta rule by Triton kernels."""

from typing import Any

from torch import Tensor

from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.gpu import serves, unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples
from seqtrain.kernels.operator import Inputs

__all__ = ["EXAMPLES", "run", "serves", "step", "unavailable"]

EXAMPLES = recurrence_examples(delta_rule, beta=True)


def run(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
    """Triton's `delta_rule`, without `read` and `erase`."""
    from seqtrain.kernels.triton import recurrence

    return recurrence.run(inputs[:5], *others)


# With one token per row, the forward pass is a single launch.
step = run
