"""Linear attention with decay by Triton kernels; wider heads, and float64 on a GPU, take the chunked form."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples
from seqtrain.kernels.linear_attention import chunked, linear_attention
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.segments import by_segment

__all__ = ["EXAMPLES", "find_map", "read", "run", "step", "unavailable"]

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
        if "K=V=128 bfloat16" in whole.name
    ),
)


def run(inputs: Inputs, *others: Any) -> tuple[Tensor, Tensor]:
    """Triton's `linear_attention`."""
    from seqtrain.kernels.triton import recurrence

    if not recurrence.serves(inputs[0]):
        return chunked.run(inputs, *others)
    return recurrence.run((*inputs[:3], None, inputs[3]), *others)


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    from seqtrain.kernels.triton import recurrence, segment

    return (segment if recurrence.serves(k) else chunked).find_map(k, v, log_decay)


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """As that of the chunked form."""
    from seqtrain.kernels.triton import recurrence, segment

    return (segment if recurrence.serves(q) else chunked).read(q, log_decay, state, scale, out)


# With one token per row, the forward pass is a single launch.
step = run
