"""The delta rule by Triton kernels; wider heads than theirs, and float64 on a GPU, take the chunked form."""

from torch import Tensor

from seqtrain.kernels.delta_rule import chunked, delta_rule
from seqtrain.kernels.gpu import Example, unavailable

__all__ = ["EXAMPLES", "run", "step", "unavailable"]


def _example(name: str, decay: str | None, width: int = 128, dtype: str = "bfloat16") -> Example:
    tensors = dict.fromkeys(("q", "k"), ("B T H K", dtype)) | {"v": ("B T H V", dtype)}
    tensors["beta"] = ("B T H", dtype)
    if decay is not None:
        tensors["log_decay"] = (decay, "float32")
    sizes = {"B": 1, "H": 1, "K": width, "V": width}
    return Example(f"delta_rule {name} K=V={width} {dtype}", delta_rule, tensors, sizes, tokens=(64, 128))


EXAMPLES = (
    _example("no decay", None),
    _example("decay [B,T,H]", "B T H"),
    _example("decay [B,T,H,K]", "B T H K"),
)


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


# Of one token a row, the forward pass is a single launch.
step = run
