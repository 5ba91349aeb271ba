"""Softmax attention over a sharded sequence: a window by its halo, full attention by heads or by blocks.

* A window: the last `window - 1` keys and values come from the left, and the operator continues from there. Sinks are
  the first tokens of a rank's first document, wherever they lie: a rank in the middle of a long document gets them from
  the one on which it starts.
* By heads, where the number of ranks divides theirs: each rank gets the whole row for its share of heads, runs the
  operator, and hands the outputs back. All ranks have the same work.
* By blocks otherwise, and where documents are short: keys and values of a rank's first document come to it rank by
  rank, and partial results are merged. In a long document later ranks have more work.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels import softmax_attention
from seqtrain.kernels.segments import PastKeys, PastKeysAndSinks
from seqtrain.parallel.block_attention import block_attention
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.halo import HaloPlan, left_halo, past_inputs
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import Call, ContinuedSequence, Groups, SplitInTime, State, splits
from seqtrain.parallel.sharded import ShardedSequence

# Documents that begin at most a quarter of the longest part before their rank are cheaper by blocks: little travels,
# and the work remains about even.
NEAR = 4


@splits(PastKeys)
class Keys(SplitInTime):
    """The state is keys and values: B rows `[B,S,...]`, of which the last `length` count, or documents end to end."""

    def sharded(self, sequence: ShardedSequence, call: Call) -> tuple[Tensor, State]:
        """Initial states are of the same shape and lengths on every rank; full attention wants all rows to count.

        The state with a window is the one after this rank's last token. Without one it holds this rank's own keys and
        values only, those of its last document: the whole past would be as large as the row. Where a sequence is
        `continued` the last rank has all.
        The option `form` says how full attention is done; `"auto"`: by heads where H and G divide by the number of
        ranks, unless no document reaches farther to the left of a rank than a quarter of the longest part.

        Numbers received per rank, B times: with a window at most `(window-1) G (K+V)`, and as many sent back in
        backward. By heads about `(P-1)/P T_r (H+G) (K+V)`, the same in backward. By blocks `F G (K+V)` for the F tokens
        of this rank's first document that lie before it; in backward they come again and their gradients, as many
        numbers, are sent back. All travel in the dtype of the inputs.
        Raises `ValueError` for a form that can't be, and for a state with unequal lengths.
        """
        (q, k, v), state = call.tensors, call.initial_state
        if call.options.get("window") is not None:
            return _windowed(sequence, call)
        ranks, form = len(sequence.offsets) - 1, call.options.get("form", "auto")
        divides = q.shape[2] % ranks == 0 and k.shape[2] % ranks == 0
        if form == "heads" and not divides:
            heads = f"H={q.shape[2]} and G={k.shape[2]} heads"
            raise ValueError(f"softmax_attention: form='heads' with {heads} on {ranks} ranks, which must divide both")
        if state is not None and state["length"].tolist() != [state["k"].shape[1]] * k.shape[0]:
            lengths = f"{state['length'].tolist()[:8]}, on several ranks it must be S={state['k'].shape[1]} per row"
            raise ValueError(f"softmax_attention: initial_state[length] is {lengths}")
        start, end = sequence.own_boundaries[-2:]
        length = torch.full((k.shape[0],), end - start, dtype=torch.int64, device=k.device)
        own_keys = {"k": k[:, start:], "v": v[:, start:], "length": length}
        given, k, v = _joined(k, v, sequence, state)
        if sequence.continued:
            own_keys, q = _whole_past(own_keys, q, k, v, sequence, given)
        plan = _whole_documents(sequence, given)
        scores = {name: call.options[name] for name in ("scale", "score_cap") if name in call.options}
        longest = max(end - start for start, end in pairwise(plan.offsets))
        far = NEAR * max(plan.before(rank) for rank in range(ranks)) > longest
        if form == "heads" or (form == "auto" and divides and far):
            return _by_heads(q, k, v, sequence, given, scores), own_keys
        return _by_blocks(q, k, v, sequence, plan, scores), own_keys

    def continued(self, sequence: ContinuedSequence, state: State) -> State:
        # Rows of keys and values are counted by `length`: those of a first document are all there are.
        return state | {"length": sequence.first(state["length"])}

    def last(self, states: State) -> State:
        length = states["length"][-1:]
        first = states["k"].shape[1] - int(length)
        return {"k": states["k"][:, first:], "v": states["v"][:, first:], "length": length}

    def grouped(self, groups: Groups, state: State, *, packed: bool) -> State:
        k, v, length = state["k"], state["v"], state["length"]
        if not packed:
            counted = torch.arange(k.shape[1], device=k.device) >= (k.shape[1] - length)[:, None]  # B S
            k, v = k[counted][None], v[counted][None]
        return {"k": k, "v": v, "length": groups.spread(length)}

    def collected(self, groups: Groups, states: State, *, rows: int | None) -> State:
        length, last = groups.collect(states["length"]), groups.last.to(states["length"].device)
        if rows is None:
            kept = torch.zeros_like(states["length"])
            kept[last] = (length > 0).to(kept.dtype)
            chosen = kept.repeat_interleave(states["length"], output_size=states["k"].shape[1]).bool()
            return {"k": states["k"][:, chosen], "v": states["v"][:, chosen], "length": length}
        end = states["length"].cumsum(0)[last]
        index = end[:, None] - rows + torch.arange(rows, device=end.device)  # B rows
        real = index >= (end - length)[:, None]

        def padded(values: Tensor) -> Tensor:
            zero = values.new_zeros(1, *values.shape[2:])
            return torch.cat([zero, values[0]])[torch.where(real, index + 1, 0)]

        return {"k": padded(states["k"]), "v": padded(states["v"]), "length": length}


@splits(PastKeysAndSinks)
class KeysAndSinks(SplitInTime):
    """The state is the last keys and values and a document's first ones, padded: `[B or N, ...]`."""

    def sharded(self, sequence: ShardedSequence, call: Call) -> tuple[Tensor, State]:
        """Initial states have the same lengths on every rank.

        Numbers received per rank, B times: at most `(window - 1 + sinks) G (K+V)`, twice the sinks with an initial
        state, and as many sent back in backward.
        """
        _, k, v = call.tensors[:3]
        window, sinks = call.options["window"], call.options.get("sinks", 0)
        past = _before(k, v, sequence, window, sinks, call.initial_state)
        owed = list(past.values())
        local, past = sequence.own_documents(past)
        out, state = call.run(sequence, past, local)
        # An output without tokens depends on nothing.
        owed += [part for part in call.tensors if part is not None and out.shape[1] == 0]
        owed = [part for part in owed if part.is_floating_point()]
        return keep_in_graph(out, *owed), state if local is None else self.last(state)


def _windowed(sequence: ShardedSequence, call: Call) -> tuple[Tensor, State]:
    (_, k, v), initial_state = call.tensors, call.initial_state
    given, keys, values = _joined(k, v, sequence, initial_state)
    plan = sequence.before(call.options["window"] - 1, given=given)
    past_k, past_v = left_halo(keys, plan, group=sequence.group), left_halo(values, plan, group=sequence.group)
    before = plan.before(sequence.rank)
    length = torch.full((k.shape[0],), before, dtype=torch.int64, device=k.device)
    if initial_state is not None and plan.starts[sequence.rank] < 0:
        # Of the given rows only the last `length` count.
        length = (initial_state["length"] + sequence.offsets[sequence.rank]).clamp(max=before)
    local = None
    if sequence.cu_seqlens is not None:
        local = torch.tensor(sequence.own_boundaries, dtype=torch.int32, device=k.device)
        # Packed pasts have no rows that don't count, and documents that start here have none at all.
        counted = int(length)
        past_k, past_v = past_k[:, before - counted :], past_v[:, before - counted :]
        length = F.pad(length, (0, len(sequence.own_boundaries) - 2))
    out, state = call.run(sequence, {"k": past_k, "v": past_v, "length": length}, local)
    return keep_in_graph(out, past_k, past_v), state if local is None else Keys().last(state)


def _joined(k: Tensor, v: Tensor, sequence: ShardedSequence, state: State | None) -> tuple[int, Tensor, Tensor]:
    """How many rows of a state there are, and keys and values, on the first rank after the state's."""
    if state is None:
        return 0, k, v
    if sequence.rank == 0:
        k, v = torch.cat([state["k"].to(k.dtype), k], 1), torch.cat([state["v"].to(v.dtype), v], 1)
    return state["k"].shape[1], k, v


def _whole_past(
    own: State, q: Tensor, k: Tensor, v: Tensor, sequence: ShardedSequence, given: int
) -> tuple[State, Tensor]:
    """`own` with, on the last rank, what others hold of the same document before it, and `q`, on which that hangs."""
    *firsts, last = sequence.offsets[:-1]
    plan = HaloPlan((*firsts, min(sequence.boundaries[-2] or -given, last)), sequence.offsets, given)
    before = {name: left_halo(x, plan, group=sequence.group) for name, x in (("k", k), ("v", v))}
    state = {name: torch.cat([x.to(own[name].dtype), own[name]], 1) for name, x in before.items()}
    return state | {"length": own["length"] + before["k"].shape[1]}, keep_in_graph(q, *before.values())


@dataclass(frozen=True)
class _ByHeads:
    """Who holds how many tokens and heads: `tokens` of q on each rank, `given` rows of a state before rank 0's keys."""

    sequence: ShardedSequence
    batch: int
    given: int

    @property
    def ranks(self) -> int:
        return len(self.sequence.offsets) - 1

    @property
    def tokens(self) -> list[int]:
        return [end - start for start, end in pairwise(self.sequence.offsets)]

    @property
    def agreed(self) -> str:
        return f"softmax_attention by heads {self.sequence.offsets} {self.given} {self.batch}"

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
            group=self.sequence.group,
            agreed=f"{self.agreed} {shapes}",
        )
        parts = [part.view(piece) for part, piece in zip(came.split(sizes), pieces, strict=True)]
        return [torch.cat(parts[which::3], 1) for which in range(3)]

    def own_rows(self, out: Tensor) -> Tensor:
        """`[B,T,H/P,V]` of all ranks' tokens -> `[B,T_r,H,V]`, all heads of this rank's."""
        own = (self.batch, self.tokens[self.sequence.rank], *out.shape[2:])
        came = exchange(
            torch.cat([piece.reshape(-1) for piece in out.split(self.tokens, 1)]),
            [self.batch * count * out.shape[2:].numel() for count in self.tokens],
            [torch.Size(own).numel()] * self.ranks,
            group=self.sequence.group,
            agreed=f"{self.agreed} {tuple(out.shape)} out",
        )
        return came.view(self.ranks, *own).movedim(0, 2).flatten(2, 3)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, sequence: ShardedSequence, given: int, scores: dict[str, Any]) -> Tensor:
    """Everything to everyone, by heads; the whole row for this rank's heads; and back."""
    heads = _ByHeads(sequence, q.shape[0], given)
    whole_q, whole_k, whole_v = heads.whole_rows(q, k.to(q.dtype), v.to(q.dtype))
    state, boundaries = None, None
    if sequence.cu_seqlens is not None:
        boundaries = torch.tensor(sequence.boundaries, dtype=torch.int32, device=q.device)
    if given:
        length = torch.full((q.shape[0],), given, dtype=torch.int64, device=q.device)
        # The state is the first document's.
        length = length if boundaries is None else F.pad(length, (0, len(sequence.boundaries) - 2))
        state = {"k": whole_k[:, :given], "v": whole_v[:, :given], "length": length}
    out, _ = softmax_attention(
        whole_q,
        whole_k[:, given:],
        whole_v[:, given:],
        **scores,
        initial_state=state,
        cu_seqlens=boundaries,
        backend=sequence.backend,
    )
    return heads.own_rows(out).to(v.dtype)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, sequence: ShardedSequence, plan: HaloPlan, scores: dict[str, Any]
) -> Tensor:
    """The first document by blocks from the left, where it began on an earlier rank; the others by the operator."""
    head = sequence.own_boundaries[1] if plan.before(sequence.rank) else 0
    outs, scale = [], scores.get("scale")
    if plan.any:
        head_out = block_attention(
            q[:, :head],
            k.to(q.dtype),
            v.to(q.dtype),
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            cap=scores.get("score_cap", 0.0),
            fused=sequence.backend != "reference",
            plan=plan,
            group=sequence.group,
        )
        outs.append(head_out.to(v.dtype))
    if head < q.shape[1] or not outs:
        first = head + (plan.given if sequence.rank == 0 else 0)
        local = None
        if sequence.cu_seqlens is not None:
            inner = sequence.own_boundaries[1:] if head else sequence.own_boundaries
            local = torch.tensor([boundary - head for boundary in inner], dtype=torch.int32, device=q.device)
        out, _ = softmax_attention(
            q[:, head:], k[:, first:], v[:, first:], **scores, cu_seqlens=local, backend=sequence.backend
        )
        outs.append(out)
    return keep_in_graph(torch.cat(outs, 1), q)


def _whole_documents(sequence: ShardedSequence, given: int) -> HaloPlan:
    """Each rank wants all of its first document that lies before it; a rank without tokens wants nothing."""
    starts = sequence.before(sequence.offsets[-1] + given, given=given).starts
    wanted = (
        end if end == after else start for start, (end, after) in zip(starts, pairwise(sequence.offsets), strict=True)
    )
    return HaloPlan(tuple(wanted), sequence.offsets, given)


def _before(k: Tensor, v: Tensor, sequence: ShardedSequence, window: int, sinks: int, initial: State | None) -> State:
    """The state of this rank's first document before its first token."""
    start, document = sequence.offsets[sequence.rank], sequence.document_start
    length = torch.full((k.shape[0],), start - document, dtype=torch.int64, device=k.device)
    seen = initial["length"] if initial is not None and document == 0 else torch.zeros_like(length)
    first = sequence.first_of_document(sinks, given=0 if initial is None else sinks)
    past = {"length": length + seen}
    for key, x in {"k": k, "v": v}.items():
        past[key] = past_inputs(x, window - 1, sequence, None if initial is None else initial[key])
        if initial is not None and sequence.rank == 0:
            x = torch.cat([initial[f"sink_{key}"].to(x.dtype), x], 1)
        given = sinks if initial is not None and document == 0 else 0
        past[f"sink_{key}"] = _sinks(left_halo(x, first, group=sequence.group), sinks, given, seen)
    return past


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
