"""Softmax attention over a sharded sequence: a window by its halo, full attention by heads and a ring.

* A window: the last `window - 1` keys and values come from the left, and the operator continues from there. Sinks are
  the first tokens of a rank's first document, wherever they lie: a rank in the middle of a long document gets them from
  the one on which it starts.
* Full attention: heads within groups of ranks, a ring of the groups (`attention_layout`, `ring_attention`).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.segments import PastKeys, PastKeysAndSinks
from seqtrain.parallel.attention_layout import COSTS, Heads, Layout, balanced, cheapest, contiguous
from seqtrain.parallel.halo import HaloPlan, left_halo, past_inputs
from seqtrain.parallel.ring_attention import RankLayout, sharded_attention
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import Call, ContinuedSequence, Groups, SplitInTime, State, splits
from seqtrain.parallel.sharded import ShardedSequence

# How full attention is done: groups of so many neighbours that divide the heads, and whether their work is balanced.
# "heads": all ranks are one group, "blocks": each is one, of its own tokens.
Form = Literal["auto", "heads", "blocks"] | tuple[int, bool]


@splits(PastKeys)
class Keys(SplitInTime):
    """The state is keys and values: B rows `[B,S,...]`, of which the last `length` count, or documents end to end."""

    def sharded(self, sequence: ShardedSequence, call: Call) -> tuple[Tensor, State]:
        """Initial states are of the same shape and lengths on every rank; full attention wants all rows to count.

        The state with a window is the one after this rank's last token. Without one it holds this rank's own keys and
        values only, those of its last document: the whole past would be as large as the row. Where a sequence is
        `continued` the last rank has all.
        The option `form` says how full attention is done, see `Form`; `"auto"`: the cheapest by estimated time.

        Numbers received per rank, B times: with a window at most `(window-1) G (K+V)`, and as many sent back in
        backward. Full attention in groups of I ranks: about `T_r (H+G) (K+V)` where tokens leave their rank, twice as
        many backward; and keys and values that go around, at most `T G (K+V) / I`, backward again with their gradients.
        All travel in the dtype of the inputs, gradients that go around in float32.
        Raises `ValueError` for a form that can't be, and for a state with unequal lengths.
        """
        (q, k, v), state = call.tensors, call.initial_state
        if call.options.get("window") is not None:
            return _windowed(sequence, call)
        if state is not None and state["length"].tolist() != [state["k"].shape[1]] * k.shape[0]:
            lengths = f"{state['length'].tolist()[:8]}, on several ranks it must be S={state['k'].shape[1]} per row"
            raise ValueError(f"softmax_attention: initial_state[length] is {lengths}")
        start, end = sequence.own_boundaries[-2:]
        length = torch.full((k.shape[0],), end - start, dtype=torch.int64, device=k.device)
        own_keys = {"k": k[:, start:], "v": v[:, start:], "length": length}
        given, k, v = _joined(k, v, sequence, state)
        if sequence.continued:
            own_keys, q = _whole_past(own_keys, q, k, v, sequence, given)
        place = _place(sequence, q, k, v, given, call.options.get("form", "auto"))
        scale = call.options.get("scale")
        out = sharded_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            cap=call.options.get("score_cap", 0.0),
            fused=sequence.backend != "reference",
            place=place,
            group=sequence.group,
        )
        return keep_in_graph(out.to(v.dtype), q), own_keys

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
        local = sequence.own_cu_seqlens(k.device)
        # Packed pasts have no rows that don't count, and documents that start here have none at all.
        counted = int(length)
        past_k, past_v = past_k[:, before - counted :], past_v[:, before - counted :]
        length = F.pad(length, (0, len(sequence.own_boundaries) - 2))
    out, state = call.run(sequence, {"k": past_k, "v": past_v, "length": length}, local)
    # An output without tokens depends on nothing.
    owed = call.tensors if out.shape[1] == 0 else ()
    return keep_in_graph(out, past_k, past_v, *owed), state if local is None else Keys().last(state)


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


def _place(sequence: ShardedSequence, q: Tensor, k: Tensor, v: Tensor, given: int, form: Form) -> RankLayout:
    """How this rank takes part, the same in every layer of a kind. Raises `ValueError` for a form that can't be."""
    shape = (q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype.itemsize)

    def make() -> RankLayout:
        kind = q.device.type
        layout = attention_layout(sequence.offsets, sequence.boundaries, Heads(*shape), kind, given=given, form=form)
        return RankLayout(layout, sequence.rank)

    return sequence.planned(("attention", *shape, given, form), make)


def attention_layout(
    offsets: tuple[int, ...], boundaries: tuple[int, ...], heads: Heads, device: str, *, given: int = 0, form: Form
) -> Layout:
    """Of a row; `device`: its kind. Raises `ValueError` for a form that can't be."""
    if form == "auto":
        return cheapest(offsets, boundaries, heads, COSTS[device], given)
    ranks = len(offsets) - 1
    inner, even = {"heads": (ranks, False), "blocks": (1, False)}[form] if isinstance(form, str) else form
    if ranks % inner or heads.queries % inner or heads.keys % inner:
        came = f"form={form!r} with H={heads.queries} and G={heads.keys} heads on {ranks} ranks"
        raise ValueError(f"softmax_attention: {came}: groups of {inner} ranks must divide all three")
    return (balanced if even else contiguous)(offsets, boundaries, inner, given)


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
