"""Attention over a window and sinks of a sequence cut in time: both come from the left, and the operator goes on.

The window is a halo. The sinks are the first tokens of a rank's first document, wherever they lie: a rank in the middle
of a long document gets them from the one on which it starts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.sink_attention import sink_attention
from seqtrain.parallel.halo import CutRow, left_halo
from seqtrain.parallel.local_call import tie

State = dict[str, Tensor]


def sharded_sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_score: Tensor | None = None,
    extra_value: Tensor | None = None,
    *,
    row: CutRow,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    initial_state: State | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """`sink_attention` of a row that the ranks of a group hold in pieces: `(out, state)` for this rank's tokens.

    Args:
        q, k, v, extra_score, extra_value: `[B,T_r,...]`, this rank's tokens; any T_r, 0 too.
        row: where they stand in the row. Every rank of its group calls, and asks for gradients where others do; its
            loss must depend on `out`, of no tokens too.
        window, sinks, scale, backend: as for the operator.
        initial_state: the operator's state for B rows (one row with documents: it is the first one's); on every rank or
            on none, of the same lengths. The keys and values of the first rank's are read.

    The state that comes back is the one after this rank's last token, for B rows or one document. Numbers received a
    rank, B times: at most `(window - 1 + sinks) G (K+V)`, twice the sinks with an initial state, and as many sent back
    in backward. Raises `ValueError` as the operator does.
    """
    past, came = _before(k, v, row, window, sinks, initial_state)
    local = None
    if row.cu_seqlens is not None:
        pieces = len(row.own_boundaries) - 1
        local = torch.tensor(row.own_boundaries, dtype=torch.int32, device=k.device)
        # Documents that start here have no past.
        past = {key: F.pad(part, (*(0, 0) * (part.dim() - 1), 0, pieces - 1)) for key, part in past.items()}
    out, state = sink_attention(
        q,
        k,
        v,
        extra_score,
        extra_value,
        window=window,
        sinks=sinks,
        scale=scale,
        initial_state=past,
        cu_seqlens=local,
        backend=backend,
    )
    # Ranks that don't read the initial state give it a zero gradient.
    owed = [] if initial_state is None else [part for part in initial_state.values() if part.is_floating_point()]
    # An output without tokens depends on nothing.
    owed += [part for part in (q, k, v, extra_score, extra_value) if part is not None and q.shape[1] == 0]
    return tie(out, *came, *owed), state if local is None else {key: part[-1:] for key, part in state.items()}


def _before(
    k: Tensor, v: Tensor, row: CutRow, window: int, sinks: int, initial: State | None
) -> tuple[State, list[Tensor]]:
    """The state of this rank's first document before its first token, and what came of it from other ranks."""
    start, document = row.offsets[row.rank], row.document_start
    length = torch.full((k.shape[0],), start - document, dtype=torch.int64, device=k.device)
    seen = torch.zeros_like(length)
    if initial is not None and document == 0:
        seen = initial["length"]
    halo = row.before(window - 1, given=0 if initial is None else window - 1)
    first = row.first_of_document(sinks, given=0 if initial is None else sinks)
    past, came = {"length": length + seen}, []
    for key, x in {"k": k, "v": v}.items():
        near, sunk = x, x
        if initial is not None and row.rank == 0:
            near, sunk = (torch.cat([initial[name].to(x.dtype), x], 1) for name in (key, f"sink_{key}"))
        near, sunk = left_halo(near, halo, group=row.group), left_halo(sunk, first, group=row.group)
        came += [near, sunk]
        missing = window - 1 - near.shape[1]
        past[key] = torch.cat([near.new_zeros(near.shape[0], missing, *near.shape[2:]), near], 1)
        given = sinks if initial is not None and document == 0 else 0
        past[f"sink_{key}"] = _sinks(sunk, sinks, given, seen)
    return past, came


def _sinks(came: Tensor, sinks: int, given: int, seen: Tensor) -> Tensor:
    """`[B,sinks,...]` of `came: [B,given + tokens,...]`: the first `seen: int64 [B]` of the given ones, then tokens."""
    count = came.shape[1]
    if not given:
        return torch.cat([came, came.new_zeros(came.shape[0], sinks - count, *came.shape[2:])], 1)
    place = torch.arange(sinks, device=came.device).expand(len(seen), -1)
    held = seen[:, None].clamp(max=sinks)
    token = given + place - held
    # Places that no token has reached yet are those of the given state: zeros.
    index = torch.where((place >= held) & (token < count), token, place)
    return came.gather(1, index.view(*index.shape, 1, 1).expand(-1, -1, *came.shape[2:]))
