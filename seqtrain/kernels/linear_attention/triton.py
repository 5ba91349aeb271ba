"""Linear attention with decay by Triton kernels."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from seqtrain.kernels.gpu import serves, unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples
from seqtrain.kernels.linear_attention import linear_attention
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.segments import by_segment

__all__ = ["EXAMPLES", "find_map", "read", "run", "serves", "step", "unavailable"]

_WHOLE = recurrence_examples(linear_attention, beta=False)

EXAMPLES = (
    *_WHOLE,
    *(
        replace(
            whole,
            name=f"segment of {whole.name}",
            operator=by_segment(linear_attention),
            tensors={**whole.tensors, "initial_state": ("B H K V", "float32")},
        )
        for whole in _WHOLE
        if "K=V=128 bfloat16" in whole.name and "long" not in whole.name
    ),
)


def run(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
    """Triton's `linear_attention`."""
    from seqtrain.kernels.triton import recurrence

    return recurrence.run((*inputs[:3], None, inputs[3]), *others)


def find_map(inputs: Inputs, no_state: None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    from seqtrain.kernels.triton import segment

    return segment.find_map(*inputs[1:])


def read(inputs: Inputs, state: Tensor, scale: float) -> Tensor:
    """As that of the chunked form."""
    from seqtrain.kernels.triton import segment

    q, _, out, log_decay = inputs
    return segment.read(q, log_decay, state, scale, out)


# With one token per row, the forward pass is a single launch.
step = run
