"""Every token is given what another one was, a fixed number of tokens before it."""

import torch
from torch import Tensor

from seqtrain.kernels.operator import operator
from seqtrain.kernels.rows import Rows
from seqtrain.kernels.segments import PastInputs


@operator(
    arguments={"x": "B T ..."},
    kinds={"x": "any dtype"},
    out="B T ...",
    state=lambda *, B, T, by, **rest: (by, *rest.values()),
    state_dtype=lambda dtype: dtype,
    flops=lambda **_: 0,
    time=PastInputs(lambda tensors, options: options["by"]),
)
def delay(
    x: Tensor, *, by: int, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`out_t = x_{t - by}` within t's row or document, zeros before its start.

    `x`: `[B,T,...]`, any dtype. `by`: tokens, 0 or more. `initial_state`: `[B,by,...]`, the inputs before the first
    token, oldest first (zeros when None); `[N,by,...]` with documents. `cu_seqlens`: int `[N+1]`, document boundaries
    of a packed row (then B == 1). `backend`: all backends are this one.

    Returns `out`, `[B,T,...]`, and the last `by` inputs of each row or document, both in x's dtype. Raises `ValueError`
    for a wrong shape or device, or a negative `by`.
    """
    if by < 0:
        raise ValueError(f"delay: by={by}, expected 0 tokens or more")
    past = delay.prepare((x,), backend, initial_state, cu_seqlens, by=by).state
    rows, new = Rows.of(x, cu_seqlens), x.flatten(0, 1)
    after = rows.last(past, new)
    if by == 0:
        return x, after
    if cu_seqlens is None:
        return torch.cat([past, x], 1)[:, : x.shape[1]], after
    piece, offset = rows.places(new.shape[0])
    # A token's number in its past followed by its row is its own offset in the row.
    before = piece * by + offset
    source = torch.where(offset < by, before, past.shape[0] * by + torch.arange(new.shape[0], device=x.device) - by)
    return torch.cat([past.flatten(0, 1), new])[source].view_as(x), after
