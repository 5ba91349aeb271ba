"""Which rank does what of softmax attention over a whole sequence: pure functions of where ranks and documents begin.

P ranks are `outer` groups of `inner` neighbours. A group attends for some of the row's tokens, each of its ranks for
some heads; keys and values of documents that several groups share go around a ring of groups. The queries need not be
where their tokens are: in a *balanced* layout a long document is cut in `2 * outer` pieces, of which group g has the
g-th and the g-th from the end (a zigzag), so that all have the same number of pairs of a query and a key; what is
shorter lies on one group whole. In a *contiguous* one each group has its own ranks' tokens.

One group is attention by heads alone (Ulysses), one rank a group a ring alone.
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from seqtrain.parallel.schedules import Costs

# What moving a token costs in pairs of a query and a key: keeps the numbers of tokens about even, too.
TOKEN_PAIRS = 1024
# More pairs than this of the mean are too many.
BALANCE = 1.05
# What attention costs, by device: seconds of a message, of a byte and of a multiply-add. Constants, so that a run
# chooses as the one before. Those of GPUs are an H100's with a network card of its own, not measured here.
COSTS = {"cpu": Costs(1e-4, 1e-4, 1e-9, 2e-11), "cuda": Costs(2e-5, 1e-5, 2.5e-11, 5e-15)}


class Span(NamedTuple):
    """Positions `start ... end` of one document, held by one group; before 0 are the rows of a state.

    `document`: where it starts; `shared`: whether all of it that counts is not in this span, so that it goes around.
    """

    start: int
    end: int
    document: int
    shared: bool

    @property
    def first_query(self) -> int:
        return max(self.start, 0)

    @property
    def keys(self) -> int:
        return self.end - self.start

    @property
    def queries(self) -> int:
        return self.end - self.first_query

    @property
    def pairs(self) -> int:
        """Of its queries with all keys that they see, rows of a state left out."""
        before = self.first_query - self.document
        return self.queries * before + self.queries * (self.queries + 1) // 2


class Rectangle(NamedTuple):
    """Queries and keys by their places, `first ... last`; `causal`: of the same positions, else all see all."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Round:
    """What a group does with the block that comes over `distance` groups, and what it sends after it.

    `rows`: of the block; `work` on it; `passed`: its rows that the next group wants, `home`: those that nobody wants
    any more, whose gradients go back; `back`: rows of what the group sent first whose gradients come back now.
    """

    distance: int
    rows: int
    work: tuple[Rectangle, ...]
    passed: tuple[slice, ...]
    home: tuple[slice, ...]
    back: tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """`spans[g]`: what group g holds, in order of position; `given` rows of a state lie before position 0."""

    offsets: tuple[int, ...]
    inner: int
    spans: tuple[tuple[Span, ...], ...]
    given: int = 0
    # Of the layouts in use, by which operators find theirs.
    number: int = field(default_factory=itertools.count(1).__next__, compare=False)

    @property
    def outer(self) -> int:
        return len(self.spans)

    @cached_property
    def moves(self) -> bool:
        """Whether anything leaves its rank before and after."""
        if self.inner > 1:
            return True
        held = zip(self.spans, pairwise(self.offsets), strict=True)
        return any(span.first_query < start or span.end > end for spans, (start, end) in held for span in spans)

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Of a query and a key that it sees, by group, for one head."""
        return tuple(sum(span.pairs for span in spans) for spans in self.spans)

    @cached_property
    def shared(self) -> tuple[tuple[Span, ...], ...]:
        """By group, the spans that go around."""
        return tuple(tuple(span for span in spans if span.shared) for spans in self.spans)

    @cached_property
    def reach(self) -> tuple[tuple[int, ...], ...]:
        """By group, for each span that goes around, over how many groups the last one lies that wants it."""
        last_starts: dict[int, dict[int, int]] = {}
        for group, spans in enumerate(self.shared):
            for span in spans:
                if span.queries:
                    last_starts.setdefault(span.document, {})[group] = span.start
        return tuple(
            tuple(self._reach(group, span, last_starts.get(span.document, {})) for span in spans)
            for group, spans in enumerate(self.shared)
        )

    def _reach(self, group: int, span: Span, last_starts: dict[int, int]) -> int:
        """`last_starts`: by group in rising order, where its last queries of the document start."""
        before = [other for other in last_starts if other < group]
        after = [other for other in last_starts if other > group]
        # The farthest along the ring are those just before it.
        for other in (*reversed(before), *reversed(after)):
            if last_starts[other] >= span.end:
                return (other - group) % self.outer
        return 0

    @cached_property
    def farthest(self) -> int:
        """Over how many groups anything travels: so many rounds there are."""
        return max((distance for group in self.reach for distance in group), default=0)

    def own_work(self, group: int) -> tuple[Rectangle, ...]:
        """What a group does with its own shared spans; keys count in its own block."""
        return _work(self.shared[group], self.query_rows(group), self.shared[group])

    def query_rows(self, group: int) -> list[int]:
        """Where among the group's queries those of its shared spans begin."""
        firsts, count = [], 0
        for span in self.spans[group]:
            if span.shared:
                firsts.append(count)
            count += span.queries
        return firsts

    def key_slices(self, group: int) -> list[slice]:
        """Where among the group's keys those of its shared spans are: its own block."""
        found, count = [], 0
        for span in self.spans[group]:
            if span.shared:
                found.append(slice(count, count + span.keys))
            count += span.keys
        return found

    def rounds(self, group: int) -> list[Round]:
        """What a group does after its own work, in order."""
        firsts, found, mine = self.query_rows(group), [], self._block(group, 1)
        for distance in range(1, self.farthest + 1):
            source = (group - distance) % self.outer
            block = self._block(source, distance)
            places = _places(block)
            onward = {id(span) for span in self._block(source, distance + 1)}
            staying = {id(span) for span in self._block(group, distance + 1)}
            gone = {id(span) for span in self._block(group, distance)} - staying
            found.append(
                Round(
                    distance,
                    sum(span.keys for span in block),
                    _work(self.shared[group], firsts, block),
                    tuple(place for span, place in zip(block, places, strict=True) if id(span) in onward),
                    tuple(place for span, place in zip(block, places, strict=True) if id(span) not in onward),
                    tuple(place for span, place in zip(mine, _places(mine), strict=True) if id(span) in gone),
                )
            )
        return found

    def first_block(self, group: int) -> tuple[slice, ...]:
        """Rows of a group's own block that anyone else wants."""
        wanted = {id(span) for span in self._block(group, 1)}
        spans = self.shared[group]
        return tuple(place for span, place in zip(spans, _places(spans), strict=True) if id(span) in wanted)

    def _block(self, source: int, distance: int) -> list[Span]:
        """What still travels of a group's spans when it comes over so many groups."""
        return [span for span, reach in zip(self.shared[source], self.reach[source], strict=True) if reach >= distance]


def _places(spans: Iterable[Span]) -> list[slice]:
    ends = list(itertools.accumulate((span.keys for span in spans), initial=0))
    return [slice(*ends_of) for ends_of in pairwise(ends)]


def _work(own: Sequence[Span], firsts: Sequence[int], block: Sequence[Span]) -> tuple[Rectangle, ...]:
    """Of a group's shared spans, whose queries begin at `firsts`, with those of a block."""
    found: list[Rectangle] = []
    by_document: dict[int, list[tuple[Span, slice]]] = {}
    for span, place in zip(block, _places(block), strict=True):
        by_document.setdefault(span.document, []).append((span, place))
    for mine, first in zip(own, firsts, strict=True):
        queries = slice(first, first + mine.queries)
        for span, place in by_document.get(mine.document, ()) if mine.queries else ():
            if span is mine:
                # Rows of a state before its first queries come as keys without queries.
                given = mine.keys - mine.queries
                if given:
                    found.append(Rectangle(queries, slice(place.start, place.start + given), False))
                found.append(Rectangle(queries, slice(place.start + given, place.stop), True))
            elif span.end <= mine.first_query:
                joins = found and not found[-1].causal and found[-1].queries == queries
                if joins and found[-1].keys.stop == place.start:
                    place = slice(found.pop().keys.start, place.stop)
                found.append(Rectangle(queries, place, False))
    # What is causal first: it gives every query something.
    return tuple(sorted(found, key=lambda rectangle: not rectangle.causal))


def contiguous(offsets: tuple[int, ...], boundaries: tuple[int, ...], inner: int, given: int = 0) -> Layout:
    """Each group has its ranks' tokens."""
    spans = []
    for start, end in pairwise(offsets[::inner]):
        held: list[Span] = []
        first = max(bisect_right(boundaries, start) - 1, 0)
        for document, after in pairwise(boundaries[first : bisect_right(boundaries, max(end - 1, 0)) + 1]):
            low, high = max(document, start), min(after, end)
            if low < high:
                with_state = given if document == 0 else 0
                shared = (low, high) != (document, after) or with_state > 0
                held.append(Span(low - (with_state if low == 0 else 0), high, document, shared))
        spans.append(tuple(held))
    return Layout(offsets, inner, tuple(spans), given)


def balanced(offsets: tuple[int, ...], boundaries: tuple[int, ...], inner: int, given: int = 0) -> Layout:
    """All groups have the same work: what would be too much for one is cut in a zigzag over all."""
    starts, outer = offsets[::inner], (len(offsets) - 1) // inner
    lengths = {start: end - start for start, end in pairwise(boundaries) if end > start}
    work = {start: n * (n + 1) // 2 + TOKEN_PAIRS * n for start, n in lengths.items()}
    longest, mean = sorted(work, key=work.__getitem__, reverse=True), sum(work.values()) / outer
    best: tuple[float, list[tuple[int, int]]] | None = None
    for share in (2.0**-n for n in range(8)):
        loads, whole = _shared_out(longest, work, share * mean, starts)
        if best is None or loads < best[0]:
            best = loads, whole
        if loads <= BALANCE * mean:
            break
    held: list[list[Span]] = [[] for _ in range(outer)]
    placed = dict(best[1]) if best else {}
    for document, length in lengths.items():
        with_state = given if document == 0 else 0
        if document in placed:
            held[placed[document]].append(
                Span(document - with_state, document + length, document, shared=with_state > 0)
            )
            continue
        cuts = [document + piece * length // (2 * outer) for piece in range(2 * outer + 1)]
        for piece, (low, high) in enumerate(pairwise(cuts)):
            if low < high:
                group = min(piece, 2 * outer - 1 - piece)
                held[group].append(Span(low - (with_state if low == 0 else 0), high, document, shared=outer > 1))
    return Layout(offsets, inner, tuple(tuple(sorted(spans)) for spans in held), given)


def _shared_out(
    longest: list[int], work: dict[int, int], limit: float, starts: tuple[int, ...]
) -> tuple[float, list[tuple[int, int]]]:
    """The most work of a group, and documents with their group, where those with more than `limit` go to all.

    Others stay with the group where they start as long as it has no more than its share, else go to whom has least.
    """
    outer, whole = len(starts) - 1, []
    long = [document for document in longest if work[document] > limit and outer > 1]
    spread = sum(work[document] for document in long) / outer
    mean = sum(work.values()) / outer
    loads, heap = [spread] * outer, [(spread, group) for group in range(outer)]
    for document in longest[len(long) :]:
        home = min(max(bisect_right(starts, document) - 1, 0), outer - 1)
        if loads[home] + work[document] > mean:
            while heap[0][0] != loads[heap[0][1]]:
                heapq.heappop(heap)
            home = heap[0][1]
        loads[home] += work[document]
        heapq.heappush(heap, (loads[home], home))
        whole.append((document, home))
    return max(loads), whole


@dataclass(frozen=True)
class Heads:
    """Of a layer: query heads, key and value heads, their widths, bytes of a number."""

    queries: int
    keys: int
    key_width: int
    value_width: int
    bytes: int = 4


def seconds(layout: Layout, heads: Heads, costs: Costs) -> float:
    """Forward and backward pass of attention, estimated, on the rank that has most to do."""
    return _computed(layout, heads, costs) + exposed(layout, heads, costs)


def exposed(layout: Layout, heads: Heads, costs: Costs) -> float:
    """Seconds of both passes in which a rank waits for messages and does not compute.

    Forward q, k, v go and the output comes; backward they go again with the output and its gradient, and three
    gradients come. Keys and values go around forward and backward, and their gradients in float32, while others are
    computed on.
    """
    keys, values = heads.keys * (heads.key_width + heads.value_width), heads.queries * heads.value_width
    moved, messages = 0.0, 4 * layout.farthest
    if layout.moves:
        tokens = max(end - start for start, end in pairwise(layout.offsets))
        numbers = 3.0 * (heads.queries * heads.key_width + keys + values)
        moved = (tokens - _tokens_that_stay(layout) / layout.inner) * numbers * heads.bytes
        messages += 4 * min(layout.inner * layout.outer - 1, 2 * layout.inner)
    block = max(sum(span.keys for span in spans) for spans in layout.shared)
    around = layout.farthest * block * keys / layout.inner * (2 * heads.bytes + max(4, heads.bytes))
    hidden = _computed(layout, heads, costs)
    return messages * costs.latency + moved * costs.byte + max(0.0, around * costs.byte - hidden)


def _computed(layout: Layout, heads: Heads, costs: Costs) -> float:
    pair = 3.5 * heads.queries / layout.inner * (heads.key_width + heads.value_width)
    return max(layout.pairs) * pair * costs.product


def _tokens_that_stay(layout: Layout) -> float:
    """Of the longest part, by the share of all."""
    bounds = layout.offsets[:: layout.inner]
    kept = sum(
        max(0, min(span.end, bounds[group + 1]) - max(span.first_query, bounds[group]))
        for group, spans in enumerate(layout.spans)
        for span in spans
    )
    longest = max(end - start for start, end in pairwise(layout.offsets))
    return longest * kept / max(1, layout.offsets[-1])


def layouts(offsets: tuple[int, ...], boundaries: tuple[int, ...], heads: Heads, given: int = 0) -> Iterable[Layout]:
    """All that can be: every number of ranks that divides the heads, contiguous and balanced."""
    ranks = len(offsets) - 1
    for inner in range(1, ranks + 1):
        if ranks % inner == heads.keys % inner == heads.queries % inner == 0:
            plain = contiguous(offsets, boundaries, inner, given)
            yield plain
            if max(plain.pairs) * plain.outer > BALANCE * sum(plain.pairs):
                yield balanced(offsets, boundaries, inner, given)


def cheapest(
    offsets: tuple[int, ...], boundaries: tuple[int, ...], heads: Heads, costs: Costs, given: int = 0
) -> Layout:
    """The layout with the least `seconds`; of equal ones the first."""
    return min(layouts(offsets, boundaries, heads, given), key=lambda layout: seconds(layout, heads, costs))
