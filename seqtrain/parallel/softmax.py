"""Softmax attention over a sequence cut in time: a window by its halo, full attention by heads or by blocks.

* A window: the last `window - 1` keys and values come from the left, and the operator goes on from there.
* By heads, where the number of ranks divides theirs: each rank gets the whole row for its share of heads, runs the
  operator, and hands the outputs back. All ranks have the same work.
* By blocks otherwise, and where documents are short: keys and values of a rank's first document come to it rank by
  rank, and partial results are merged. In a long document later ranks have more work.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.softmax_attention import softmax_attention
from seqtrain.parallel.block_attention import block_attention
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.halo import CutRow, Traffic, left_halo
from seqtrain.parallel.local_call import tie

State = dict[str, Tensor]
Form = Literal["auto", "heads", "blocks"]
# Documents that begin at most this part of a piece before their rank are cheaper by blocks: little travels, and the
# work remains about even.
NEAR = 4


def sharded_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    row: CutRow,
    window: int | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    backend: str = "auto",
    form: Form = "auto",
) -> tuple[Tensor, State]:
    """`softmax_attention` of a row that the ranks of a group hold in pieces: `(out, state)` for this rank's tokens.

    Args:
        q, k, v: `[B,T_r,H,K]`, `[B,T_r,G,K]`, `[B,T_r,G,V]`, this rank's tokens; any T_r, 0 too.
        row: where they stand in the row. Every rank of its group calls, and asks for gradients where others do; its
            loss must depend on `out`, of no tokens too.
        window, scale, backend: as for the operator.
        initial_state: the keys and values before the row, as the operator's state for B rows (one row with documents:
            they belong to the first); on every rank or on none, of the same shape and lengths. The first rank's is
            read. Full attention wants all its rows to count.
        form: how full attention is done; `"auto"`: by heads where H and G divide by the number of ranks, unless no
            document reaches farther to the left of a rank than a quarter of the longest piece.

    Returns `out`, `[B,T_r,H,V]` in v's dtype. The state with a window is the one after this rank's last token, as the
    operator's for B rows or for one document. Without a window it holds this rank's own keys and values only, those of
    its last document: the whole past would be as large as the row.

    Numbers received a rank, B times: with a window at most `(window-1) G (K+V)`, and as many sent back in backward. By
    heads about `(P-1)/P T_r (H+G) (K+V)`, the same in backward. By blocks `F G (K+V)` for the F tokens of this rank's
    first document that lie before it; in backward they come again and their gradients, as many numbers, are sent back.
    All travel in the dtype of the inputs.
    Raises `ValueError` as the operator does, for a form that can't be, and for a state with unequal lengths.
    """
    # Ranks that don't read the state give it a zero gradient.
    v = v if initial_state is None else tie(v, initial_state["k"], initial_state["v"])
    if window is not None:
        return _windowed(q, k, v, row, window, scale, initial_state, backend)
    ranks = len(row.offsets) - 1
    divides = q.shape[2] % ranks == 0 and k.shape[2] % ranks == 0
    if form == "heads" and not divides:
        heads = f"H={q.shape[2]} and G={k.shape[2]} heads"
        raise ValueError(f"softmax_attention: form='heads' with {heads} on {ranks} ranks, which must divide both")
    own_keys = _own_keys(k, v, row)
    given, k, v = _with_state(k, v, row, initial_state)
    traffic = _whole_documents(row, given)
    if form == "heads" or (form == "auto" and divides and _reaches_far(traffic)):
        return _by_heads(q, k, v, row, given, scale, backend), own_keys
    return _by_blocks(q, k, v, row, traffic, scale, backend), own_keys


def _reaches_far(traffic: Traffic) -> bool:
    """Whether some rank wants more than a small part of what the longest piece has."""
    ranks = range(len(traffic.starts))
    longest = max(end - start for start, end in pairwise(traffic.offsets))
    return NEAR * max(traffic.before(rank) for rank in ranks) > longest


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: CutRow,
    window: int,
    scale: float | None,
    initial_state: State | None,
    backend: str,
) -> tuple[Tensor, State]:
    given, keys, values = _joined(k, v, row, initial_state)
    traffic = row.before(window - 1, given=given)
    past_k, past_v = left_halo(keys, traffic, group=row.group), left_halo(values, traffic, group=row.group)
    before = traffic.before(row.rank)
    length = torch.full((k.shape[0],), before, dtype=torch.int64, device=k.device)
    if initial_state is not None and traffic.starts[row.rank] < 0:
        # Of the given rows only the last `length` count.
        length = (initial_state["length"] + row.offsets[row.rank]).clamp(max=before)
    local = None
    if row.cu_seqlens is not None:
        local = torch.tensor(row.own_boundaries, dtype=torch.int32, device=k.device)
        # Packed pasts have no rows that don't count, and documents that start here have none at all.
        counted = int(length)
        past_k, past_v = past_k[:, before - counted :], past_v[:, before - counted :]
        length = F.pad(length, (0, len(row.own_boundaries) - 2))
    past = {"k": past_k, "v": past_v, "length": length}
    out, state = softmax_attention(
        q, k, v, window=window, scale=scale, initial_state=past, cu_seqlens=local, backend=backend
    )
    return tie(out, past_k, past_v), state if local is None else _of_last_document(state)


def _of_last_document(state: State) -> State:
    first = state["k"].shape[1] - int(state["length"][-1])
    return {"k": state["k"][:, first:], "v": state["v"][:, first:], "length": state["length"][-1:]}


def _own_keys(k: Tensor, v: Tensor, row: CutRow) -> State:
    start, end = row.own_boundaries[-2:]
    length = torch.full((k.shape[0],), end - start, dtype=torch.int64, device=k.device)
    return {"k": k[:, start:], "v": v[:, start:], "length": length}


def _joined(k: Tensor, v: Tensor, row: CutRow, state: State | None) -> tuple[int, Tensor, Tensor]:
    """How many rows of a state there are, and keys and values, on the first rank behind the state's."""
    if state is None:
        return 0, k, v
    if row.rank == 0:
        k, v = torch.cat([state["k"].to(k.dtype), k], 1), torch.cat([state["v"].to(v.dtype), v], 1)
    return state["k"].shape[1], k, v


def _with_state(k: Tensor, v: Tensor, row: CutRow, state: State | None) -> tuple[int, Tensor, Tensor]:
    if state is not None and state["length"].tolist() != [state["k"].shape[1]] * k.shape[0]:
        lengths = f"{state['length'].tolist()[:8]}, on several ranks it must be S={state['k'].shape[1]} for each row"
        raise ValueError(f"softmax_attention: initial_state[length] is {lengths}")
    return _joined(k, v, row, state)


@dataclass(frozen=True)
class _ByHeads:
    """Who holds how many tokens and heads: `tokens` of q on each rank, `given` rows of a state before rank 0's keys."""

    row: CutRow
    batch: int
    given: int

    @property
    def ranks(self) -> int:
        return len(self.row.offsets) - 1

    @property
    def tokens(self) -> list[int]:
        return [end - start for start, end in pairwise(self.row.offsets)]

    @property
    def agreed(self) -> str:
        return f"softmax_attention by heads {self.row.offsets} {self.given} {self.batch}"

    def whole_rows(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """`[B,T,H/P,K]`, `[B,S+T,G/P,K]`, `[B,S+T,G/P,V]`: this rank's heads of all ranks' tokens."""
        shapes = [(x.shape[2] // self.ranks, x.shape[3]) for x in (q, k, v)]
        keys = [self.tokens[0] + self.given, *self.tokens[1:]]
        # Rank by rank what it has of q, k and v.
        pieces = [
            (self.batch, count, *shape)
            for counts in zip(self.tokens, keys, keys, strict=True)
            for count, shape in zip(counts, shapes, strict=True)
        ]
        sizes = [torch.Size(piece).numel() for piece in pieces]
        leaving = torch.cat([x.unflatten(2, (self.ranks, -1)).movedim(2, 0).flatten(1) for x in (q, k, v)], 1)
        came = exchange(
            leaving.flatten(),
            [leaving.shape[1]] * self.ranks,
            [sum(sizes[first : first + 3]) for first in range(0, len(sizes), 3)],
            group=self.row.group,
            agreed=f"{self.agreed} {shapes}",
        )
        parts = [part.view(piece) for part, piece in zip(came.split(sizes), pieces, strict=True)]
        return [torch.cat(parts[which::3], 1) for which in range(3)]

    def own_rows(self, out: Tensor) -> Tensor:
        """`[B,T,H/P,V]` of all ranks' tokens -> `[B,T_r,H,V]`, all heads of this rank's."""
        own = (self.batch, self.tokens[self.row.rank], *out.shape[2:])
        came = exchange(
            torch.cat([piece.reshape(-1) for piece in out.split(self.tokens, 1)]),
            [self.batch * count * out.shape[2:].numel() for count in self.tokens],
            [torch.Size(own).numel()] * self.ranks,
            group=self.row.group,
            agreed=f"{self.agreed} {tuple(out.shape)} out",
        )
        return came.view(self.ranks, *own).movedim(0, 2).flatten(2, 3)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, row: CutRow, given: int, scale: float | None, backend: str) -> Tensor:
    """Everything to everyone, cut by heads; the whole row for this rank's heads; and back."""
    heads = _ByHeads(row, q.shape[0], given)
    whole_q, whole_k, whole_v = heads.whole_rows(q, k.to(q.dtype), v.to(q.dtype))
    state, boundaries = None, None
    if row.cu_seqlens is not None:
        boundaries = torch.tensor(row.boundaries, dtype=torch.int32, device=q.device)
    if given:
        length = torch.full((q.shape[0],), given, dtype=torch.int64, device=q.device)
        # The state is the first document's.
        length = length if boundaries is None else F.pad(length, (0, len(row.boundaries) - 2))
        state = {"k": whole_k[:, :given], "v": whole_v[:, :given], "length": length}
    out, _ = softmax_attention(
        whole_q,
        whole_k[:, given:],
        whole_v[:, given:],
        scale=scale,
        initial_state=state,
        cu_seqlens=boundaries,
        backend=backend,
    )
    return heads.own_rows(out).to(v.dtype)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, row: CutRow, traffic: Traffic, scale: float | None, backend: str
) -> Tensor:
    """The first document by blocks from the left, where it began on an earlier rank; the others by the operator."""
    head = row.own_boundaries[1] if traffic.before(row.rank) else 0
    outs = []
    if traffic.any:
        head_out = block_attention(
            q[:, :head],
            k.to(q.dtype),
            v.to(q.dtype),
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            fused=backend != "reference",
            traffic=traffic,
            group=row.group,
        )
        outs.append(head_out.to(v.dtype))
    if head < q.shape[1] or not outs:
        first = head + (traffic.given if row.rank == 0 else 0)
        local = None
        if row.cu_seqlens is not None:
            inner = row.own_boundaries[1:] if head else row.own_boundaries
            local = torch.tensor([boundary - head for boundary in inner], dtype=torch.int32, device=q.device)
        out, _ = softmax_attention(
            q[:, head:], k[:, first:], v[:, first:], scale=scale, cu_seqlens=local, backend=backend
        )
        outs.append(out)
    return tie(torch.cat(outs, 1), q)


def _whole_documents(row: CutRow, given: int) -> Traffic:
    """Each rank wants all of its first document that lies before it; a rank without tokens wants nothing."""
    starts = row.before(row.offsets[-1] + given, given=given).starts
    wanted = (end if end == after else start for start, (end, after) in zip(starts, pairwise(row.offsets), strict=True))
    return Traffic(tuple(wanted), row.offsets, given)
