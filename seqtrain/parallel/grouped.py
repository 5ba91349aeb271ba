"""A sequence whose documents are cut into groups of tokens that know nothing of each other."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.kernels.operator import Operator
from seqtrain.kernels.segments import PastKeys


@dataclass(frozen=True)
class Groups:
    """Documents cut into groups of `size` tokens, counted from each document's start.

    `boundaries`: int64 `[G+1]`, of all groups in the flattened batch; `first`, `last`: int64 `[N]`, each document's
    first and last group; `whole`: bool `[N]`, whether the last is complete, so that the next token starts another.
    """

    boundaries: Tensor
    first: Tensor
    last: Tensor
    whole: Tensor

    @classmethod
    def of(cls, boundaries: Tensor, past: Tensor, size: int, tokens: int) -> "Groups":
        """`boundaries`: int64 `[N+1]`, of documents, `tokens` in all; `past`: int64 `[N]`, tokens before."""
        start, length, begun = boundaries[:-1], boundaries.diff(), past % size
        count = ((begun + length + size - 1) // size).clamp(min=1)
        ends = count.cumsum(0)
        # A compiled graph can't depend on how many groups there are: in it, empty ones follow the last.
        most = tokens // size + 2 * len(start)
        group = torch.arange(most if torch.compiler.is_compiling() else int(ends[-1]), device=boundaries.device)
        document = torch.searchsorted(ends, group, right=True).clamp(max=len(start) - 1)
        edges = (start - begun)[document] + (group - (ends - count)[document]) * size
        edges = torch.minimum(torch.maximum(edges, start[document]), boundaries[1:][document])
        whole = (begun + length) % size == 0
        return cls(torch.cat([edges, boundaries[-1:]]), ends - count, ends - 1, whole)

    def spread(self, states: Tensor) -> Tensor:
        """A state a document `[N,...]` -> a state a group `[G,...]`: a document's is its first's, others are zero."""
        count, first = len(self.boundaries) - 1, self.first.to(states.device)
        return states.new_zeros(count, *states.shape[1:]).index_copy(0, first, states)

    def collect(self, states: Tensor) -> Tensor:
        """A state a group -> a state a document: that of its last, zero where the next token starts another."""
        done = self.whole.to(states.device).view(-1, *(1,) * (states.dim() - 1))
        return states[self.last.to(states.device)].masked_fill(done, 0)


def run_grouped(
    operator: Operator,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    *,
    size: int,
    cu_seqlens: Tensor | None,
    past: Tensor | None,
    initial_state: Any,
    backend: str,
) -> tuple[Tensor, Any]:
    """`(out, final_state)` of `operator` on groups of `size` tokens; states, one a document (or row), are those that
    the next token continues.

    `past`: int64 `[B or N]`, tokens of each row or document seen before, None for none.
    """
    tensors, options = operator.arranged(tensors, options)
    batch, tokens = tensors[0].shape[:2]
    pairs = zip(tensors, operator.along_time(tensors), strict=True)
    flat = (x.reshape(1, batch * tokens, *x.shape[2:]) if timed else x for x, timed in pairs)
    boundaries = torch.arange(batch + 1) * tokens if cu_seqlens is None else cu_seqlens.to(torch.int64)
    seen = torch.zeros_like(boundaries[1:]) if past is None else past.to(boundaries.device)
    groups = Groups.of(boundaries, seen, size, batch * tokens)
    keys = isinstance(operator.time, PastKeys)
    if initial_state is not None:
        if keys:
            initial_state = _keys_in(initial_state, groups, packed=cu_seqlens is not None)
        else:
            initial_state = tree_map(groups.spread, initial_state)
    out, final = operator(
        *flat,
        initial_state=initial_state,
        cu_seqlens=groups.boundaries,
        backend=backend,
        **options,
    )
    out = out.view(batch, tokens, *out.shape[2:])
    if not keys:
        return out, tree_map(groups.collect, final)
    return out, _keys_out(final, groups, None if cu_seqlens is not None else size - 1)


def _keys_in(state: dict[str, Tensor], groups: Groups, *, packed: bool) -> dict[str, Tensor]:
    """A state of softmax attention a row or document as one a group, its rows end to end."""
    k, v, length = state["k"], state["v"], state["length"]
    if not packed:
        counted = torch.arange(k.shape[1], device=k.device) >= (k.shape[1] - length)[:, None]  # B S
        k, v = k[counted][None], v[counted][None]
    return {"k": k, "v": v, "length": groups.spread(length)}


def _keys_out(state: dict[str, Tensor], groups: Groups, rows: int | None) -> dict[str, Tensor]:
    """The reverse: rows end to end, or with `rows` that many for each, behind zeros where there are fewer."""
    length, last = groups.collect(state["length"]), groups.last.to(state["length"].device)
    if rows is None:
        kept = torch.zeros_like(state["length"])
        kept[last] = (length > 0).to(kept.dtype)
        chosen = kept.repeat_interleave(state["length"], output_size=state["k"].shape[1]).bool()
        return {"k": state["k"][:, chosen], "v": state["v"][:, chosen], "length": length}
    end = state["length"].cumsum(0)[last]
    index = end[:, None] - rows + torch.arange(rows, device=end.device)  # B rows
    real = index >= (end - length)[:, None]

    def padded(values: Tensor) -> Tensor:
        zero = values.new_zeros(1, *values.shape[2:])
        return torch.cat([zero, values[0]])[torch.where(real, index + 1, 0)]

    return {"k": padded(state["k"]), "v": padded(state["v"]), "length": length}
