"""The definition: every state of every token, by the definition of the scan."""

from torch import Tensor

from seqtrain.kernels.diagonal_scan import reference
from seqtrain.kernels.diagonal_system import diagonal_system
from seqtrain.kernels.operator import Inputs


@diagonal_system.backend(like=lambda inputs, state: inputs[0])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """See `diagonal_system`; the matrices have the state's dtype. `form` makes no difference here."""
    u, log_a, write, read = inputs
    written = (u[..., None].to(state.dtype) * write).flatten(2)  # B T G*N
    hidden, final = reference.run((written, log_a.flatten()), state, cu_seqlens)
    out = (hidden.unflatten(2, read.shape) * read).real.sum(3)
    return out.to(u.dtype), final
