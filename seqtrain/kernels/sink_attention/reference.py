"""The definition: one softmax per token over what it sees."""

import torch
from torch import Tensor

from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.operator import Inputs
from seqtrain.kernels.sink_attention import Known


def run(inputs: Inputs, window: int, scale: float, known: Known) -> Tensor:
    """Flat inputs, `q: [total,H,K]`; see `sink_attention`. Returns `out` alone, `[total,H,V]`."""
    q, k, v, extra_score, extra_value = inputs
    dtype, repeat = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    past, pieces, outs = known.past, zip(known.rows.start.tolist(), known.rows.length.tolist(), strict=True), []
    for n, (start, length) in enumerate(pieces):
        seen = int(past["length"][n])
        sinks = list(zip(past["sink_k"][n], past["sink_v"][n], strict=True))
        tail = list(zip(past["k"][n], past["v"][n], strict=True))
        # Keys and values by their place in the document, as sinks and as recent tokens.
        first = dict(enumerate(sinks[:seen]))
        recent = {place: pair for place, pair in enumerate(tail, seen - len(tail)) if place >= 0}
        for t in range(start, start + length):
            place = seen + t - start
            first[place] = recent[place] = k[t], v[t]
            near = range(max(place - window + 1, 0), place + 1)
            visible = [first[s] for s in range(min(len(sinks), near[0]))] + [recent[s] for s in near]
            keys = torch.stack([key for key, _ in visible]).to(dtype).repeat_interleave(repeat, 1)  # S H K
            values = torch.stack([value for _, value in visible]).to(dtype).repeat_interleave(repeat, 1)  # S H V
            scores = torch.einsum("hk,shk->hs", q[t].to(dtype), keys) * scale
            if extra_score is not None and extra_value is not None:
                scores = torch.cat([scores, extra_score[t, :, None]], 1)
                values = torch.cat([values, extra_value[None, t].to(dtype)])
            outs.append(torch.einsum("hs,shv->hv", scores.softmax(1), values))
    return torch.stack(outs) if outs else q.new_empty(0, q.shape[1], v.shape[2])
