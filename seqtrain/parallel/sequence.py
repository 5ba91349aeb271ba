"""What a layer needs to know of the sequence it is given: where documents start, which tokens this process holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from seqtrain.kernels import short_convolution
from seqtrain.parallel.recompute import kept
from seqtrain.parallel.scan import keep_in_graph

State = dict[str, Tensor]


@dataclass(frozen=True)
class SequenceContext:
    """A batch of tokens held whole by this process; mixers call their operators through `run`.

    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1), or None for B separate rows.
    `backend`: the kernels' backend for every operator, `"auto"` to choose by device.
    """

    # Whether layers on it send anything, which activation checkpointing must not do twice (`checkpoint_contexts`).
    sends: ClassVar[bool] = False
    # Whether its operators are counted and not run.
    counts: ClassVar[bool] = False

    cu_seqlens: Tensor | None = None
    backend: str = "auto"

    def run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """`operator(*tensors, ...)` on this sequence: `(out, final_state)`, one state per document (or row)."""
        call = partial(self._run, operator, *tensors, initial_state=initial_state, **options)
        found: tuple[Tensor, Any] = kept(call, (*tensors, *options.values()), cheap=operator is short_convolution)
        return found

    def _run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """What `run` does on this kind of sequence."""
        return operator(
            *tensors, initial_state=initial_state, cu_seqlens=self.cu_seqlens, backend=self.backend, **options
        )

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> "SequenceContext":
        """The sequence whose documents are split into groups of `size` tokens that know nothing of each other.

        `shift`: groups are counted from so many tokens before a document's start, its first one is as much shorter.

        `past`: int64 `[B]` (`[N]` with documents), tokens of each seen before, where a group may have begun; None for
        none. States stay one per row or document: what the next token continues, zero where it begins a group. Softmax
        attention's keys of B rows are padded to `size - 1`, as under a window. Positions continue over the groups.
        """
        return GroupedSequence(cu_seqlens=self.cu_seqlens, backend=self.backend, size=size, past=past, shift=shift)

    def repeated(self, times: int) -> "SequenceContext":
        """The sequence in which every token stands `times` times, one copy after the other."""
        return self if self.cu_seqlens is None else replace(self, cu_seqlens=times * self.cu_seqlens)

    @property
    def one_way(self) -> "SequenceContext":
        """The sequence of a layer that runs in both directions by itself."""
        return self

    def reverse(self, x: Tensor) -> Tensor:
        """`x: [B,T,...]` with the tokens of each document (or row) in reverse order."""
        if self.cu_seqlens is None:
            return x.flip(1)
        boundaries = self.cu_seqlens.to(device=x.device, dtype=torch.int64)
        place = self.positions(x.shape[1], x.device)
        index = torch.arange(x.shape[1], device=x.device)
        length = boundaries.diff().repeat_interleave(boundaries.diff(), output_size=x.shape[1])
        return x.index_select(1, index - 2 * place + length - 1)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """int64 `[T]`: each token's distance from the start of its document (or row), wherever that is."""
        index = torch.arange(tokens, device=device)
        return index - self._document_starts(index)

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of its document seen before this call, for each of `[batch, tokens]`, and after it, for each state.

        `past`: int64 `[B]` (`[N]` with documents), what an earlier call returned as the second; None for none. The
        first is int64 and broadcasts to `[B,T]`; `positions` plus it is a token's place in its document.
        """
        if self.cu_seqlens is None:
            seen = torch.full((batch,), tokens, dtype=torch.int64, device=device)
        else:
            seen = self.cu_seqlens.to(device=device, dtype=torch.int64).diff()
        if past is None:
            return seen.new_zeros(1, 1), seen
        before = past[:, None] if self.cu_seqlens is None else past.repeat_interleave(seen, output_size=tokens)[None]
        return before, seen + past

    def _document_starts(self, index: Tensor) -> Tensor:
        """For places in the whole row, int64, where their documents (or rows) start."""
        if self.cu_seqlens is None:
            return torch.zeros_like(index)
        boundaries = self.cu_seqlens.to(device=index.device, dtype=torch.int64)
        return boundaries[torch.searchsorted(boundaries, index, right=True) - 1]


@dataclass(frozen=True)
class Call:
    """`operator(*tensors, **options)` as a mixer asks for it; all tensors are by position."""

    operator: Any
    tensors: tuple[Any, ...]
    options: Mapping[str, Any]
    initial_state: Any

    def run(self, sequence: SequenceContext, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The operator itself on these tensors."""
        return self.operator(
            *self.tensors, initial_state=state, cu_seqlens=cu_seqlens, backend=sequence.backend, **self.options
        )

    def rows(self, rows: slice) -> "Call":
        """The same call on some of its tokens."""
        return replace(self, tensors=self.operator.take(self.tensors, rows))


class SplitInTime:
    """How operators of one kind, an operator's `time`, run on a sequence that is split: sharded over ranks, continued
    from an earlier call, or in groups of tokens. Found in `SPLITS` by the kind's type.

    What is here serves every operator whose state is a nesting of tensors `[B or N, ...]`, zeros for an empty past.
    """

    def sharded(self, sequence: Any, call: "Call") -> tuple[Tensor, Any]:
        """`(out, final_state)` for this rank's tokens of a `ShardedSequence`; states as that has them."""
        raise NotImplementedError

    def continued(self, sequence: "ContinuedSequence", state: Any) -> Any:
        """The state of a first document as those of all documents."""
        return tree_map(sequence.first, state)

    def last(self, states: Any) -> Any:
        """The last document's state."""
        return tree_map(_last, states)

    def grouped(self, groups: "Groups", state: Any, *, packed: bool) -> Any:
        """A state per document (or row) as one per group."""
        return tree_map(groups.spread, state)

    def collected(self, groups: "Groups", states: Any, *, rows: int | None) -> Any:
        """The reverse. `rows`: how many keys each of B separate rows is padded to; None with documents."""
        return tree_map(groups.collect, states)


# By the type of `Operator.time`: filled by the modules of this package that know how.
SPLITS: dict[type, SplitInTime] = {}


def splits(kind: type) -> Callable[[type[SplitInTime]], type[SplitInTime]]:
    """Decorates the `SplitInTime` of operators whose `time` is a `kind`."""

    def register(cls: type[SplitInTime]) -> type[SplitInTime]:
        SPLITS[kind] = cls()
        return cls

    return register


@dataclass(frozen=True)
class Groups:
    """Documents split into groups of `size` tokens, counted from each document's start.

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
        """A state per document `[N,...]` -> per group `[G,...]`: a document's is its first's, others are zero."""
        count, first = len(self.boundaries) - 1, self.first.to(states.device)
        return states.new_zeros(count, *states.shape[1:]).index_copy(0, first, states)

    def collect(self, states: Tensor) -> Tensor:
        """A state per group -> per document: that of its last, zero where the next token starts another."""
        done = self.whole.to(states.device).view(-1, *(1,) * (states.dim() - 1))
        return states[self.last.to(states.device)].masked_fill(done, 0)


@dataclass(frozen=True, kw_only=True)
class GroupedSequence(SequenceContext):
    """See `SequenceContext.grouped`."""

    size: int
    past: Tensor | None
    shift: int = 0

    def _run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        given, options = operator.arranged(tensors, options)
        batch, tokens = given[0].shape[:2]
        flat = [
            x.reshape(1, batch * tokens, *x.shape[2:]) if timed else x
            for x, timed in zip(given, operator.along_time(given), strict=True)
        ]
        packed = self.cu_seqlens is not None
        boundaries = torch.arange(batch + 1) * tokens if self.cu_seqlens is None else self.cu_seqlens.to(torch.int64)
        past = torch.zeros_like(boundaries[1:]) if self.past is None else self.past.to(boundaries.device)
        groups, kind = Groups.of(boundaries, past + self.shift, self.size, batch * tokens), SPLITS[type(operator.time)]
        if initial_state is not None:
            initial_state = kind.grouped(groups, initial_state, packed=packed)
        out, states = operator(
            *flat, initial_state=initial_state, cu_seqlens=groups.boundaries, backend=self.backend, **options
        )
        final = kind.collected(groups, states, rows=None if packed else self.size - 1)
        return out.view(batch, tokens, *out.shape[2:]), final

    def repeated(self, times: int) -> SequenceContext:
        past = None if self.past is None else times * self.past
        boundaries = None if self.cu_seqlens is None else times * self.cu_seqlens
        return replace(self, cu_seqlens=boundaries, size=times * self.size, past=past, shift=times * self.shift)

    def reverse(self, x: Tensor) -> Tensor:
        raise ValueError("groups are counted from the start: a bidirectional layer can't run in them")

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> SequenceContext:
        raise ValueError(
            f"groups of {size} tokens within groups of {self.size}: choose a layer that has none of its own"
        )


@dataclass(frozen=True, kw_only=True)
class ContinuedSequence(SequenceContext):
    """Part of a packed row, held whole: its first document may have begun before it, its last may continue after it.

    States are those of one document, as with `ShardedSequence`: `initial_state` is what the first document has seen,
    None where it begins here; the state that comes back is the last document's. Made by `of`.
    """

    # The same tokens with a state per document.
    documents: SequenceContext
    # Whether a state that is given counts. Where the first document begins here it doesn't, and its gradient is zero.
    continues: bool = True

    @classmethod
    def of(cls, documents: SequenceContext, *, continues: bool = True) -> "ContinuedSequence":
        """`documents`: these tokens by themselves, with boundaries `cu_seqlens` from 0 to their number."""
        assert documents.cu_seqlens is not None
        return cls(cu_seqlens=documents.cu_seqlens, backend=documents.backend, documents=documents, continues=continues)

    def _run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        kind, state = SPLITS[type(operator.time)], None
        if initial_state is not None and self.continues:
            state = kind.continued(self, initial_state)
        out, states = self.documents.run(operator, *tensors, initial_state=state, **options)
        if initial_state is not None and not self.continues:
            out = keep_in_graph(out, *with_gradients(initial_state))
        return out, kind.last(states)

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> "ContinuedSequence":
        return replace(self, documents=self.documents.grouped(size, self._past(past), shift))

    def repeated(self, times: int) -> "ContinuedSequence":
        return self.of(self.documents.repeated(times), continues=self.continues)

    def reverse(self, x: Tensor) -> Tensor:
        raise ValueError("a row read piece by piece can't be reversed: a bidirectional layer needs it whole")

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        before, after = self.documents.count(self._past(past), batch, tokens, device)
        return before, _last(after)

    def _past(self, past: Tensor | None) -> Tensor | None:
        """Tokens of each document seen before, `[N]`, from those of the first."""
        return self.first(past) if past is not None and self.continues else None

    def first(self, state: Tensor) -> Tensor:
        """The state `[1,...]` of the first document as those of all, `[N,...]`: an empty past is zero everywhere."""
        assert self.cu_seqlens is not None
        return torch.cat([state, state.new_zeros(len(self.cu_seqlens) - 2, *state.shape[1:])])


def with_gradients(state: Any) -> list[Tensor]:
    """The tensors of a state that may have a gradient."""
    return [part for part in tree_leaves(state) if part.is_floating_point() or part.is_complex()]


def _last(states: Tensor) -> Tensor:
    return states[-1:]
