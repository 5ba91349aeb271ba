"""What a layer needs to know of the sequence it is given: where documents start, which tokens this process holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqtrain.parallel.grouped import run_grouped


@dataclass(frozen=True)
class SequenceContext:
    """A batch of tokens held whole by this process; mixers call their operators through `run`.

    `cu_seqlens`: int `[N+1]`, document boundaries of a packed row (then B == 1), or None for B separate rows.
    `backend`: the kernels' backend for every operator, `"auto"` to choose by device.
    """

    # Whether layers on it send anything, which activation checkpointing must not do twice (`checkpoint_contexts`).
    sends: ClassVar[bool] = False

    cu_seqlens: Tensor | None = None
    backend: str = "auto"

    def run(
        self, operator: Callable, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """`operator(*tensors, ...)` on this sequence: `(out, final_state)`, one state a document (or row)."""
        return operator(
            *tensors, initial_state=initial_state, cu_seqlens=self.cu_seqlens, backend=self.backend, **options
        )

    def grouped(self, size: int, past: Tensor | None = None) -> "SequenceContext":
        """The sequence whose documents are cut into groups of `size` tokens that know nothing of each other.

        `past`: int64 `[B]` (`[N]` with documents), tokens of each seen before, where a group may have begun; None for
        none. States stay one a row or document: what the next token continues, zero where it begins a group. Softmax
        attention's keys of B rows are padded to `size - 1`, as under a window. Positions go on over the groups.
        """
        return GroupedSequence(cu_seqlens=self.cu_seqlens, backend=self.backend, size=size, past=past)

    def repeated(self, times: int) -> "SequenceContext":
        """The sequence in which every token stands `times` times, one copy behind the other."""
        return self if self.cu_seqlens is None else replace(self, cu_seqlens=times * self.cu_seqlens)

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


@dataclass(frozen=True, kw_only=True)
class GroupedSequence(SequenceContext):
    """See `Sequence.grouped`."""

    size: int
    past: Tensor | None

    def run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        return run_grouped(
            operator,
            tensors,
            options,
            size=self.size,
            cu_seqlens=self.cu_seqlens,
            past=self.past,
            initial_state=initial_state,
            backend=self.backend,
        )

    def repeated(self, times: int) -> SequenceContext:
        past = None if self.past is None else times * self.past
        boundaries = None if self.cu_seqlens is None else times * self.cu_seqlens
        return replace(self, cu_seqlens=boundaries, size=times * self.size, past=past)

    def reverse(self, x: Tensor) -> Tensor:
        raise ValueError("groups are counted from the start: a bidirectional layer can't run in them")

    def grouped(self, size: int, past: Tensor | None = None) -> SequenceContext:
        raise ValueError(
            f"groups of {size} tokens within groups of {self.size}: choose a layer that has none of its own"
        )
