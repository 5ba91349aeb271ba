"""One split of a corpus as one long row of ids, whatever files it lies in."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import numpy as np

from seqtrain.data.shards import Shard, SplitEntry
from seqtrain.data.tokenizer import Tokenizer

# Each open shard holds two file descriptors, of which a process may commonly have 1024.
OPEN_SHARDS = 64


class TokenStream:
    """One split as one long row of ids, its documents in order, each closed by the tokenizer's `end`."""

    def __init__(self, name: str, entry: SplitEntry, shards: list[Shard], tokenizer: Tokenizer):
        self.name = name
        self.documents = entry.documents
        self.tokens = entry.tokens
        self.bytes = entry.bytes
        self.tokenizer = tokenizer
        # Text bytes for each byte counted from tokens: 1 unless the tokenizer normalises its text.
        self.byte_scale = entry.bytes / entry.token_bytes if entry.token_bytes else 1.0
        # Bytes of everything that is predicted: all but the first token of each document.
        self.predicted_bytes = (entry.token_bytes - entry.first_bytes) * self.byte_scale
        self._shards = shards
        self._ends = list(accumulate(shard.entry.tokens for shard in shards))
        self._document_ends = list(accumulate(shard.entry.starts for shard in shards))
        self._maps = lru_cache(maxsize=OPEN_SHARDS)(lambda number: (shards[number].ids(), shards[number].starts()))

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 `[stop - start]`: the ids at `start <= position < stop`, which must lie in the stream."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts = [self._maps(number)[0][low:high] for number, low, high in self._pieces(start, stop)]
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions `start <= position < stop` at which a document starts, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for number, low, high in self._pieces(start, stop):
            starts = self._maps(number)[1]
            first, last = np.searchsorted(starts, [low, high])
            found.append(starts[first:last] + (self._ends[number] - self._shards[number].entry.tokens))
        return np.concatenate(found)

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """int64 `[stop - first]`: the positions at which the documents `first <= number < stop` start, rising."""
        assert 0 <= first <= stop <= self.documents, (first, stop, self.documents)
        found = [np.empty(0, dtype=np.int64)]
        while first < stop:
            number = bisect_right(self._document_ends, first)
            entry, end = self._shards[number].entry, self._document_ends[number]
            base, last = end - entry.starts, min(stop, end)
            found.append(self._maps(number)[1][first - base : last - base] + (self._ends[number] - entry.tokens))
            first = last
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """`(shard, from, to)`, counted inside the shard, for every shard that `start` to `stop` touches."""
        number = bisect_right(self._ends, start)
        while start < stop and number < len(self._ends):
            base = self._ends[number] - self._shards[number].entry.tokens
            end = min(stop, self._ends[number])
            yield number, start - base, end - base
            start = end
            number += 1
