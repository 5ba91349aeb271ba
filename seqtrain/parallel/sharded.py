"""A sequence sharded in time over the ranks of a group: the same layers and operators, each rank with its own tokens.

A rank's tokens are the end of a document that began on an earlier rank (the head), then documents that start here (the
tail). Only the head needs what other ranks know, and only the last document's state is of use to others. So an operator
whose segments are affine maps costs one All-Scan, and the map of a rank where a document starts forgets what came.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from seqtrain.kernels.documents import Boundaries, boundaries_of
from seqtrain.kernels.segments import AffineScan
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.halo import HaloPlan, first_documents, first_tokens, tokens_before
from seqtrain.parallel.scan import Algorithm, keep_in_graph, open_all_scan
from seqtrain.parallel.sequence import SPLITS, Call, SequenceContext, SplitInTime, splits, with_gradients

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardedSequence(SequenceContext):
    """A row of tokens of which this rank holds `offsets[r]` to `offsets[r + 1]`, r its place in `group`.

    Tensors hold this rank's tokens alone, `[B, T_r, ...]`; any lengths will do, zero too.
    `group`: the sequence-parallel ranks that hold the row, in order of time. Each runs the same operators in the same
        order, and asks for gradients where the others do.
    `offsets`: `P + 1` boundaries of the ranks' parts, from 0 to the row's length.
    `cu_seqlens`: int `[N+1]`, document boundaries of the whole row (then B == 1), or None for B rows of one document
    each. `algorithm`: of the scans, see `all_scan`.

    `continues`: whether a state that is given counts; it doesn't where it is another document's. `continued`: whether
    another row goes on from the state after this one, and full attention's is wanted, too.

    States are those of one document (or of B rows): `initial_state`, given on every rank or on none, is read on the
    group's first, its whole numbers on all, and continues the row's first document; the state that comes back is the
    one after this rank's last token, so the last rank's is the whole row's. Raises `ValueError` for offsets that don't
    fit.
    """

    sends: ClassVar[bool] = True

    group: dist.ProcessGroup
    offsets: tuple[int, ...]
    algorithm: Algorithm = "auto"
    continues: bool = True
    continued: bool = False
    # Boundaries of the documents that have tokens, on the host: from 0 to the row's length.
    boundaries: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Boundaries of the parts of documents that this rank holds, counted from its first token: at least two.
    own_boundaries: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # The ranks among whose tokens a document starts that is not the row's first.
    resets: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Where in the row this rank's first document starts; for a rank without tokens, see `before`.
    document_start: int = field(init=False, repr=False, compare=False)
    # See `planned`.
    plans: dict[tuple, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        ranks, offsets = self.group.size(), self.offsets
        if len(offsets) != ranks + 1 or offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(
                f"offsets={offsets}: expected {ranks + 1} rising numbers from 0, the boundaries of {ranks} ranks"
            )
        if self.cu_seqlens is not None and int(self.cu_seqlens[-1]) != offsets[-1]:
            raise ValueError(f"offsets={offsets}: expected to end at {int(self.cu_seqlens[-1])}, where cu_seqlens does")
        # Found once and not when asked for: `torch.compile` can't trace a cached property.
        tokens, start, end = self.offsets[-1], self.start, self.end
        inner = set() if self.cu_seqlens is None else set(boundaries_of(self.cu_seqlens))
        boundaries = Boundaries((0, *sorted(inner - {0, tokens}), tokens))
        object.__setattr__(self, "boundaries", boundaries)
        # How many documents but the row's first start before each rank.
        before = [bisect_left(boundaries, offset, 1, len(boundaries) - 1) for offset in offsets]
        resets = (rank for rank, (first, last) in enumerate(pairwise(before)) if first < last)
        object.__setattr__(self, "resets", tuple(resets))
        own = boundaries[bisect_right(boundaries, start) : bisect_left(boundaries, end)]
        object.__setattr__(self, "own_boundaries", (0, *(boundary - start for boundary in own), end - start))
        object.__setattr__(self, "document_start", first_documents(self.offsets, boundaries)[self.rank])

    def planned(self, key: tuple, make: Callable[[], T]) -> T:
        """`make()`, once for all layers: what hangs on the row's documents and ranks is planned once a row."""
        if key not in self.plans:
            self.plans[key] = make()
        found: T = self.plans[key]
        return found

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def start(self) -> int:
        """The place in the row of this rank's first token."""
        return self.offsets[self.group.rank()]

    @property
    def end(self) -> int:
        """The place in the row after this rank's last token."""
        return self.offsets[self.group.rank() + 1]

    def head_and_tail(self, continues: bool) -> tuple[int, Tensor | None]:
        """How many of this rank's tokens continue what came before, and the documents that start after them.

        `continues`: whether the row's first document does. The second: int64 `[N+1]`, boundaries of those N documents,
        from 0; None where none starts here, and where B rows of one document each do.
        """
        return self.planned(("tail", continues), lambda: self._head_and_tail(continues))

    def _head_and_tail(self, continues: bool) -> tuple[int, Tensor | None]:
        start, end = self.start, self.end
        if self.cu_seqlens is None:
            return 0 if start == 0 and not continues else end - start, None
        first = start if start or not continues else 1
        inner = [boundary for boundary in self.boundaries if first <= boundary < end]
        if not inner:
            return end - start, None
        return inner[0] - start, torch.tensor([*inner, end], dtype=torch.int64) - inner[0]

    def own_documents(self, past: Any) -> tuple[Tensor | None, Any]:
        """`cu_seqlens` of this rank's parts of documents, None for whole rows, and `past` as the state of all of them.

        `past`: tensors `[1,...]` of the first one; documents that start here have no past, zeros.
        """
        if self.cu_seqlens is None:
            return None, past
        documents = len(self.own_boundaries) - 1

        def padded(part: Tensor) -> Tensor:
            return F.pad(part, (*(0, 0) * (part.dim() - 1), 0, documents - 1))

        return self.own_cu_seqlens(tree_leaves(past)[0].device), tree_map(padded, past)

    def own_cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 `[N+1]`, boundaries of the parts of documents that this rank holds."""
        key = ("own", device)
        return self.planned(key, lambda: torch.tensor(self.own_boundaries, dtype=torch.int32, device=device))

    def before(self, count: int, *, given: int = 0) -> HaloPlan:
        """Each rank wants the last `count` positions before its tokens, as far as its first document reaches back.

        The `given` rows belong to the row's first document. A rank without tokens continues the document of the
        token before it, so that the state after its last token is that of the rank before.
        """
        key = ("before", count, given)
        return self.planned(key, lambda: tokens_before(self.offsets, self.boundaries, count, given))

    def first_of_document(self, count: int, *, given: int = 0) -> HaloPlan:
        """Each rank wants the first `count` positions of its first document, those before its own tokens.

        The `given` rows belong to the row's first document and come before its tokens. For a rank without tokens, see
        `before`.
        """
        key = ("first", count, given)
        return self.planned(key, lambda: first_tokens(self.offsets, self.boundaries, count, given))

    def _run(self, operator: Any, *tensors: Any, initial_state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """`operator(*tensors, ...)` as on the whole row: `(out, final_state)`, out for this rank's tokens.

        What travels depends on the operator's `time`: a scan of affine maps, past inputs, keys and values, or else its
        state from rank to rank.
        """
        given, others = operator.arranged(tensors, options)
        call = Call(operator, given, others, initial_state if self.continues else None)
        out, final = SPLITS[type(operator.time)].sharded(self, call)
        if initial_state is not None:
            # Ranks that don't read it give it a zero gradient.
            out = keep_in_graph(out, *with_gradients(initial_state))
        return out, final

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> "ShardedSequence":
        # Tokens of a group that began before the row, or would have.
        seen = int(past[0]) if past is not None and self.continues else 0
        begun = (seen + shift) % size
        continues = self.continues and (past is None or begun > 0)
        key = ("grouped", size, begun, shift, continues)
        return self.planned(key, lambda: self._grouped(size, begun, shift, continues))

    def _grouped(self, size: int, begun: int, shift: int, continues: bool) -> "ShardedSequence":
        ends = [0, self.offsets[-1]] if self.cu_seqlens is None else boundaries_of(self.cu_seqlens)
        starts = [
            max(place, start)
            for start, end in pairwise(ends)
            for place in range(start - (shift if start else begun), end, size)
        ]
        boundaries = torch.tensor([*starts, ends[-1]], dtype=torch.int32)
        return replace(self, cu_seqlens=boundaries, continues=continues)

    def repeated(self, times: int) -> "ShardedSequence":
        return self.planned(("repeated", times), lambda: self._repeated(times))

    def _repeated(self, times: int) -> "ShardedSequence":
        offsets = tuple(times * offset for offset in self.offsets)
        return replace(self, offsets=offsets, cu_seqlens=None if self.cu_seqlens is None else times * self.cu_seqlens)

    def reverse(self, x: Tensor) -> Tensor:
        place, to, come, arrival = self.planned(("reverse", x.device), lambda: self._reversal(x.device))
        rest, batch = x.shape[2:], x.shape[0]
        width = batch * rest.numel()
        rows = x.transpose(0, 1).index_select(0, place).reshape(-1)
        sizes = [[width * count for count in counts] for counts in (to, come)]
        came = exchange(rows, *sizes, group=self.group, agreed=f"reverse {self.offsets} {self.boundaries} {width}")
        return came.view(-1, batch, *rest).index_select(0, arrival).transpose(0, 1)

    def _reversal(self, device: torch.device) -> tuple[Tensor, list[int], list[int], Tensor]:
        """In which order this rank's tokens leave, how many go to and come from each rank, and where those lie.

        A token goes to the place in its document that is as far from its end; so what is there comes to its place.
        """
        index = torch.arange(self.start, self.end)
        starts = torch.tensor(self.boundaries)
        document = torch.searchsorted(starts, index, right=True) - 1
        mirror = starts[document] + starts[document + 1] - 1 - index
        order = mirror.argsort()
        ranks = torch.searchsorted(torch.tensor(self.offsets), mirror[order], right=True) - 1
        # Ranks without tokens have the boundary of the one after them.
        counts = torch.bincount(ranks, minlength=self.group.size()).tolist()
        # What comes from a rank comes by rising place here; those from earlier ranks first.
        source = torch.searchsorted(torch.tensor(self.offsets), mirror, right=True) - 1
        arrival = source.argsort(stable=True).argsort()
        return order.to(device), counts, counts, arrival.to(device)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        index = torch.arange(self.start, self.end, device=device)
        return index - self._document_starts(index)

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.start, self.end, device=device)
        last = torch.tensor([max(self.end - 1, 0)], device=device)
        before, start = self._document_starts(index) == 0, self._document_starts(last)
        after = (self.end - start).expand(batch)
        if past is None or not self.continues:
            return torch.zeros_like(index)[None], after
        return before * past[:, None], after + past * (start == 0)


@splits(AffineScan)
class ScannedSegments(SplitInTime):
    """A rank's tokens are an affine map of the incoming state: one All-Scan forward, one backward.

    Receives are posted before anything is computed. Where the rank's tokens all continue an earlier document, what does
    not need the incoming state is computed while it is on its way; otherwise only the last document matters to others,
    and the head waits.
    """

    def sharded(self, sequence: ShardedSequence, call: Call) -> tuple[Tensor, Tensor]:
        initial, tokens = call.initial_state, sequence.end - sequence.start
        head, tail = sequence.head_and_tail(initial is not None)
        segment = call.operator.segment(call.tensors, call.options, sequence.backend)
        batch, device = call.tensors[0].shape[0], call.tensors[0].device
        shape, dtype = call.operator.state_shape(call.tensors, call.options, batch)
        form = segment.transition_shape(call.tensors, call.options)
        group, algorithm, resets = sequence.group, sequence.algorithm, sequence.resets
        scan = open_all_scan(form, shape, dtype=dtype, device=device, group=group, algorithm=algorithm, resets=resets)
        if initial is not None:
            initial = initial.to(dtype)
        if head == tokens:
            transition, update = segment.transition()
            if tokens == 0:
                # A map without tokens may depend on nothing, and yet the gradients of other ranks go through it.
                update = keep_in_graph(update, *filter(torch.is_tensor, call.tensors))
            scan.start(transition, update, initial_state=initial)
            segment.local_output()
            state, final = scan.wait()
            return keep_in_graph(segment.add_incoming(state), state), final
        out, states = call.rows(slice(head, tokens)).run(sequence, None, tail)
        unread = None if form is None else torch.zeros(form, dtype=dtype, device=device)
        state, final = scan.start(unread, states[-batch:], initial_state=initial).wait()
        if head == 0:
            return keep_in_graph(out, state), final
        before, _ = call.rows(slice(0, head)).run(sequence, state, None)
        return torch.cat([before, out], 1), final
