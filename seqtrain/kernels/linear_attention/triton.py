"""Linear attention with decay by Triton kernels; wider heads, and float64 on a GPU, take the chunked form."""

from torch import Tensor

from seqtrain.kernels.gpu import recurrence_examples, unavailable
from seqtrain.kernels.linear_attention import chunked, linear_attention

__all__ = ["EXAMPLES", "run", "step", "unavailable"]

EXAMPLES = recurrence_examples(linear_attention, beta=False)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Triton's `linear_attention`; arguments as `linear_attention` normalises them."""
    from seqtrain.kernels.triton import recurrence

    if not recurrence.serves(q):
        return chunked.run(q, k, v, log_decay, state, scale, cu_seqlens)
    return recurrence.run(q, k, v, None, log_decay, state, scale, cu_seqlens)


# Of one token a row, the forward pass is a single launch.
step = run
