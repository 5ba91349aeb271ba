"""A packed row that goes on where another ended: what a long row is where it is read piece by piece."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.kernels.segments import PastKeys
from seqtrain.parallel.sequence import SequenceContext


@dataclass(frozen=True, kw_only=True)
class ContinuedSequence(SequenceContext):
    """A piece of a packed row, held whole: its first document may have begun before it, its last may go on behind it.

    States are those of one document, as with `ShardedSequence`: `initial_state` is what the first document has seen,
    None where it begins here; the state that comes back is the last document's. Made by `of`.
    """

    # The same tokens with a state a document.
    documents: SequenceContext

    @classmethod
    def of(cls, documents: SequenceContext) -> "ContinuedSequence":
        """`documents`: the piece by itself, with boundaries `cu_seqlens` from 0 to its length."""
        assert documents.cu_seqlens is not None
        return cls(cu_seqlens=documents.cu_seqlens, backend=documents.backend, documents=documents)

    def run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        keys = isinstance(operator.time, PastKeys)
        if initial_state is not None:
            # Rows of keys and values are counted by `length`: those of a first document are all there are.
            counted = {"length": self._first(initial_state["length"])} if keys else {}
            initial_state = initial_state | counted if keys else tree_map(self._first, initial_state)
        out, states = self.documents.run(operator, *tensors, initial_state=initial_state, **options)
        return out, _last_keys(states) if keys else tree_map(_last, states)

    def grouped(self, size: int, past: Tensor | None = None) -> "ContinuedSequence":
        return replace(self, documents=self.documents.grouped(size, None if past is None else self._first(past)))

    def repeated(self, times: int) -> "ContinuedSequence":
        return self.of(self.documents.repeated(times))

    def reverse(self, x: Tensor) -> Tensor:
        raise ValueError("a row read piece by piece can't be reversed: a bidirectional layer needs it whole")

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        before, after = self.documents.count(None if past is None else self._first(past), batch, tokens, device)
        return before, _last(after)

    def _first(self, state: Tensor) -> Tensor:
        """The state `[1,...]` of the first document as those of all, `[N,...]`: an empty past is zero everywhere."""
        assert self.cu_seqlens is not None
        return torch.cat([state, state.new_zeros(len(self.cu_seqlens) - 2, *state.shape[1:])])


def _last(states: Tensor) -> Tensor:
    return states[-1:]


def _last_keys(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last document's keys and values: rows of all documents lie end to end."""
    length = _last(states["length"])
    first = states["k"].shape[1] - int(length)
    return {"k": states["k"][:, first:], "v": states["v"][:, first:], "length": length}
