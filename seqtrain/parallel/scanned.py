"""An operator whose segments are affine maps of its state, over a cut sequence: one All-Scan forward, one backward."""

import torch
from torch import Tensor

from seqtrain.parallel.local_call import LocalCall, tie
from seqtrain.parallel.scan import Algorithm, open_all_scan


def run_scanned(call: LocalCall, initial_state: Tensor | None, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """`(out, final_state)` of `call` in a row cut over its group; states `[B,...]` as those of `all_scan`.

    Receives are posted before anything is computed. Where the rank's tokens all continue an earlier document, what does
    not need the incoming state is computed while it is on its way; otherwise only the last document matters to others,
    and the head waits.
    """
    part = call.operator.segment(call.tensors, call.options, call.backend)
    shape, dtype = call.operator.state_shape(call.tensors, call.options, call.batch)
    form = part.transition_shape(call.tensors, call.options)
    if form is None and call.packed:
        form = (call.batch,)  # one factor: 1, or 0 where a document starts
    opened = open_all_scan(form, shape, dtype=dtype, device=call.device, group=call.group, algorithm=algorithm)
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    pieces = call.pieces
    if pieces.head == pieces.tokens:
        transition, update = part.transition()
        if transition is None and form is not None:
            transition = update.new_ones(form)
        scan = opened.start(transition, update, initial_state=initial_state)
        part.local_output()
        state, final = scan.wait()
        # An output without tokens may depend on nothing.
        owed = [tensor for tensor in call.tensors if tensor is not None] if pieces.tokens == 0 else []
        return tie(part.add_incoming(state), state, *owed), final
    out, states = call.tail().run(cu_seqlens=pieces.tail)
    forgets = None if form is None else torch.zeros(form, dtype=dtype, device=call.device)
    state, final = opened.start(forgets, states[-call.batch :], initial_state=initial_state).wait()
    if pieces.head == 0:
        return tie(out, state), final
    before, _ = call.head().run(initial_state=state)
    return torch.cat([before, out], 1), final
