"""The delta rule by Triton kernels; wider heads than theirs, and float64 on a GPU, take the chunked form."""

from torch import Tensor

from seqtrain.kernels.delta_rule import chunked, delta_rule
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import recurrence_examples

__all__ = ["EXAMPLES", "run", "step", "unavailable"]

EXAMPLES = recurrence_examples(delta_rule, beta=True)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Triton's `delta_rule`, without `read` and `erase`; arguments as `delta_rule` normalises them."""
    from seqtrain.kernels.triton import recurrence

    if not recurrence.serves(q):
        return chunked.run(q, k, v, beta, log_decay, state, scale, cu_seqlens)
    return recurrence.run(q, k, v, beta, log_decay, state, scale, cu_seqlens)


# With one token per row, the forward pass is a single launch.
step = run
