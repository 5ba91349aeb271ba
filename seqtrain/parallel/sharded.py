"""A sequence cut in time over the ranks of a group: the same layers, the same operators, each rank with its own tokens.

A rank's tokens are the end of a document that began on an earlier rank (the head), then documents that start here (the
tail). Only the head needs what other ranks know, and only the last document's state is of use to others. So an operator
whose segments are affine maps costs one All-Scan, and the map of a rank where a document starts has a zero transition.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.segments import AffineScan, PastInputs, PastKeys, PastKeysAndSinks
from seqtrain.parallel.halo import CutRow, run_with_past_inputs
from seqtrain.parallel.local_call import LocalCall, Pieces
from seqtrain.parallel.relay import run_relayed
from seqtrain.parallel.scan import Algorithm
from seqtrain.parallel.scanned import run_scanned
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sinks import sharded_sink_attention
from seqtrain.parallel.softmax import sharded_softmax_attention


@dataclass(frozen=True, kw_only=True)
class ShardedSequence(SequenceContext):
    """A row of tokens of which this rank holds `offsets[r]` to `offsets[r + 1]`, r its place in `group`.

    Tensors hold this rank's tokens alone, `[B, T_r, ...]`; any lengths will do, zero too.
    `group`: the ranks that hold the row, in order of time. Each runs the same operators in the same order, and asks for
        gradients where the others do.
    `offsets`: `P + 1` boundaries of the ranks' pieces, from 0 to the row's length.
    `cu_seqlens`: int `[N+1]`, document boundaries of the whole row (then B == 1), or None for B rows of one document
    each. `algorithm`: of the scans, see `all_scan`.

    States are those of one document (or of B rows): `initial_state`, given on every rank or on none, is read on the
    group's first and continues the row's first document; the state that comes back is the one after this rank's last
    token, so the last rank's is the whole row's. Raises `ValueError` for offsets that don't fit.
    """

    sends: ClassVar[bool] = True

    group: dist.ProcessGroup
    offsets: tuple[int, ...]
    algorithm: Algorithm = "auto"

    def __post_init__(self) -> None:
        ranks, offsets = self.group.size(), self.offsets
        if len(offsets) != ranks + 1 or offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(
                f"offsets={offsets}: expected {ranks + 1} rising numbers from 0, the boundaries of {ranks} ranks"
            )
        if self.cu_seqlens is not None and int(self.cu_seqlens[-1]) != offsets[-1]:
            raise ValueError(f"offsets={offsets}: expected to end at {int(self.cu_seqlens[-1])}, where cu_seqlens does")

    @property
    def start(self) -> int:
        """The place in the row of this rank's first token."""
        return self.offsets[self.group.rank()]

    @property
    def end(self) -> int:
        """The place in the row behind this rank's last token."""
        return self.offsets[self.group.rank() + 1]

    def run(self, operator: Any, *tensors: Any, initial_state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """`operator(*tensors, ...)` as on the whole row: `(out, final_state)`, out for this rank's tokens.

        What travels depends on the operator's `time`: a scan of affine maps, past inputs,
        keys and values, or else its state from rank to rank.
        """
        tensors, options = operator.arranged(tensors, options)
        time = operator.time
        if isinstance(time, PastKeys):
            return sharded_softmax_attention(
                *tensors, row=self._row, initial_state=initial_state, backend=self.backend, **options
            )
        if isinstance(time, PastKeysAndSinks):
            return sharded_sink_attention(
                *tensors, row=self._row, initial_state=initial_state, backend=self.backend, **options
            )
        if isinstance(time, PastInputs):
            return run_with_past_inputs(
                operator,
                *tensors,
                count=time.count(tensors, options),
                row=self._row,
                initial_state=initial_state,
                backend=self.backend,
                options=options,
            )
        packed = self.cu_seqlens is not None
        boundaries = self._row.boundaries if packed else None
        pieces = Pieces.of(boundaries, self.start, self.end, continues=initial_state is not None)
        call = LocalCall(operator, tensors, options, self.backend, pieces, self.group, packed)
        if isinstance(time, AffineScan):
            return run_scanned(call, initial_state, self.algorithm)
        return run_relayed(call, initial_state)

    def grouped(self, size: int, past: Tensor | None = None) -> "ShardedSequence":
        if past is not None:
            raise ValueError("grouped: groups of a sequence over many ranks have no past")
        ends = [0, self.offsets[-1]] if self.cu_seqlens is None else self.cu_seqlens.tolist()
        starts = [place for start, end in pairwise(ends) for place in range(start, end, size)]
        return replace(self, cu_seqlens=torch.tensor([*starts, ends[-1]], dtype=torch.int32))

    def repeated(self, times: int) -> "ShardedSequence":
        offsets = tuple(times * offset for offset in self.offsets)
        return replace(self, offsets=offsets, cu_seqlens=None if self.cu_seqlens is None else times * self.cu_seqlens)

    def reverse(self, x: Tensor) -> Tensor:
        raise ValueError("a sequence over many ranks can't be reversed: a bidirectional layer needs it whole")

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        index = torch.arange(self.start, self.end, device=device)
        return index - self._document_starts(index)

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.start, self.end, device=device)
        last = torch.tensor([max(self.end - 1, 0)], device=device)
        before, start = self._document_starts(index) == 0, self._document_starts(last)
        after = (self.end - start).expand(batch)
        if past is None:
            return torch.zeros_like(index)[None], after
        return before * past[:, None], after + past * (start == 0)

    @cached_property
    def _row(self) -> CutRow:
        return CutRow(self.group, self.offsets, self.cu_seqlens)
